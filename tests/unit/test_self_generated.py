"""Text that a model wrote itself: a prepared corpus in its tokens, equal for equal questions, without the worst."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.corpus import prepare_files
from wastenot.launch.data import Samples
from wastenot.launch.errors import UserError
from wastenot.launch.saved_run import SavedRun, open_run, write_run
from wastenot.launch.self_generated import Writing, self_generated, write_documents
from wastenot.launch.shards import TokenShards, read_meta
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder, with_router
from wastenot.parallel.mesh import single

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(f"{i} green bottles, hanging on the wall.\n" for i in range(200))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavedRun, Path]:
    """A run that never trained, with sharp routers and a tight capacity, and the prepared corpus it would train on."""
    home = tmp_path_factory.mktemp("home")
    (home / "bottles.txt").write_text(TEXT)
    data = DataConfig(dir=str(home / "data"), tokenizer="bytes", seq_len=24)
    corpus = prepare_files([home / "bottles.txt"], data, progress=False)
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=257, d_model=32, layers=2, heads=4, init_std=0.3, moe=MoEConfig(experts=4, d_expert=16)
        ),
        router=RouterConfig(capacity_factor=0.5),
        data=data,
        log=LogConfig(dir=str(home / "run")),
    )
    write_run(config, build_decoder(config.model, config.router, single()), byte_tokenizer(), "a test")
    return open_run(home / "run"), corpus


def test_the_same_question_finds_the_same_corpus(saved):
    run, corpus = saved
    heard: list[tuple[int, int]] = []
    writing = Writing(tokens=1500, seed=3)
    folder = self_generated(run, corpus, writing, lambda done, total: heard.append((done, total)))
    assert heard[-1] == (1500, 1500) and heard == sorted(heard)
    assert self_generated(run, corpus, writing, lambda done, total: pytest.fail("written again")) == folder
    assert self_generated(run, corpus, replace(writing, seed=4)) != folder
    shards = TokenShards.open(folder, "train")
    # Every document is followed by an end token, which the model was not asked for.
    assert shards.num_tokens == sum(len(document) + 1 for document in documents_of(run, corpus, writing))
    assert shards.num_tokens - shards.num_documents >= 1500
    assert Samples(shards, 24, 0).take(0, 2).shape == (2, 25)
    own, real = TokenShards.open(folder, "val"), TokenShards.open(corpus, "val")
    assert (own.read(0, own.num_tokens) == real.read(0, real.num_tokens)).all(), "held-out text stays real"
    assert read_meta(folder)["ngram_bits_per_byte"] == read_meta(corpus)["ngram_bits_per_byte"]


def documents_of(run: SavedRun, corpus: Path, writing: Writing) -> list[list[int]]:
    return write_documents(run, TokenShards.open(corpus, "train"), writing)


def test_documents_begin_with_real_text_and_fit_a_window(saved):
    run, corpus = saved
    documents = documents_of(run, corpus, Writing(tokens=600))
    assert documents == documents_of(run, corpus, Writing(tokens=600))
    assert all(len(document) <= 24 and 256 not in document for document in documents)
    assert all(bytes(document[:2]).decode() in TEXT for document in documents)
    assert len({tuple(document) for document in documents}) > 20, "they differ"


def test_what_is_left_out_has_the_highest_perplexity(saved):
    run, corpus = saved
    # One batch each: what one of them leaves out, the other has.
    everything = documents_of(run, corpus, Writing(tokens=1, keep=1.0))
    kept = documents_of(run, corpus, Writing(tokens=1, keep=0.5))
    assert len(everything) == 32 and len(kept) == 16
    assert kept == [document for document in everything if document in kept], "in the order of writing"
    dropless = with_router(run.model, RouterConfig())
    nats = {tuple(document): own_loss(dropless, document) for document in everything}
    left_out = [document for document in everything if document not in kept]
    assert max(nats[tuple(document)] for document in kept) < min(nats[tuple(document)] for document in left_out)


@torch.no_grad()
def own_loss(model, document: list[int]) -> float:
    """One document alone, so that nothing it is batched with can matter."""
    hidden_BSD = model.eval()(torch.tensor([[256, *document[:-1]]])).hidden_BSD
    logits_SV = model.logits(hidden_BSD)[0].log_softmax(-1)
    return -logits_SV.gather(-1, torch.tensor(document).unsqueeze(-1)).mean().item()


def test_bad_questions_are_refused(saved, tmp_path):
    run, _ = saved
    for wrong, message in (
        ({"tokens": 0}, "tokens: 0 is too small; use 1 or more"),
        ({"tokens": 1, "temperature": 0.0}, "temperature: 0.0 is not positive"),
        ({"tokens": 1, "keep": 1.5}, r"keep: 1.5 is outside \(0, 1\]; use 1.0"),
        ({"tokens": 1, "seed": -1}, "seed: -1 is negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Writing(**wrong)
    (tmp_path / "other.txt").write_text(TEXT)
    other = prepare_files([tmp_path / "other.txt"], DataConfig(dir=str(tmp_path), tokenizer="bpe:260"), progress=False)
    with pytest.raises(UserError, match="another tokenizer"):
        self_generated(run, other, Writing(tokens=1))
