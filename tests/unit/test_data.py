"""Training windows follow from seed and number alone, evaluation covers a split once, broken shards are named."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.launch.data import IGNORED, Samples, TokenShards, eval_windows
from wastenot.launch.errors import UserError
from wastenot.launch.shards import write_split

END = 3


def write(folder, documents, shard_tokens=7, vocab_size=1000):
    """A prepared folder whose two splits hold the same documents (lists of ids)."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for split in ("train", "val"):
        stream = ([*ids, END] for ids in documents)
        entry = write_split(folder, split, stream, vocab_size, shard_tokens)
        splits[split] = {"documents": len(documents), "text_bytes": sum(map(len, documents)), **entry}
    meta = {"tokenizer": {"vocab_size": vocab_size, "end_token": END}, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def shards_of(num_tokens):
    """A split in memory whose tokens are their own positions."""
    positions = np.arange(num_tokens)
    return TokenShards(
        folder=None,
        split="train",
        arrays=tuple(np.array_split(positions, min(3, num_tokens))),
        vocab_size=num_tokens,
        end_token=num_tokens,
        num_text_bytes=num_tokens,
        num_documents=1,
    )


sizes = st.integers(2, 12).flatmap(lambda seq_len: st.tuples(st.just(seq_len), st.integers(seq_len + 1, 200)))
seeds = st.integers(0, 2**32)


@settings(deadline=None)
@given(size=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_an_epoch_has_every_window_exactly_once(size, seed, epoch):
    seq_len, num_tokens = size
    samples = Samples(shards_of(num_tokens), seq_len, seed)
    windows = samples.take(epoch * samples.windows_per_epoch, samples.windows_per_epoch)
    assert samples.windows_per_epoch == num_tokens // seq_len
    targets = windows[:, 1:].ravel()
    assert len(set(targets.tolist())) == len(targets) == samples.windows_per_epoch * seq_len


@settings(deadline=None)
@given(size=sizes, seed=seeds, first=st.integers(0, 10**9))
def test_a_window_is_a_stretch_of_the_stream_read_as_a_ring(size, seed, first):
    seq_len, num_tokens = size
    windows = Samples(shards_of(num_tokens), seq_len, seed).take(first, 5)
    assert windows.shape == (5, seq_len + 1)
    assert windows.dtype == np.int64
    assert np.array_equal(windows, (windows[:, :1] + np.arange(seq_len + 1)) % num_tokens)


@settings(deadline=None)
@given(size=sizes, seed=seeds, first=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 9), max_size=6))
def test_any_cut_of_the_work_gives_the_same_global_order(size, seed, first, cuts):
    seq_len, num_tokens = size
    whole = Samples(shards_of(num_tokens), seq_len, seed).take(first, sum(cuts))
    # Fresh objects: what one was asked before must not matter.
    starts = np.cumsum([first, *cuts[:-1]]) if cuts else []
    parts = [Samples(shards_of(num_tokens), seq_len, seed).take(int(s), c) for s, c in zip(starts, cuts, strict=True)]
    assert np.array_equal(whole, np.concatenate([np.empty((0, seq_len + 1), np.int64), *parts]))


def test_epochs_and_seeds_differ_in_order_and_in_cutting_offset():
    def epoch(number, seed):
        samples = Samples(shards_of(10_000), 100, seed)
        return samples.take(number * 100, 100)[:, 0]

    seen = [epoch(0, 0), epoch(1, 0), epoch(2, 0), epoch(0, 1)]
    assert len({tuple(starts) for starts in seen}) == 4
    assert len({int(starts[0] % 100) for starts in seen}) > 1
    orders = [np.argsort(np.argsort(starts)) for starts in seen]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("num_windows", [2, 5, 16])
def test_shuffling_favours_no_window(num_windows):
    epochs = 4000
    samples = Samples(shards_of(num_windows * 10), 10, seed=1)
    ordered = samples.starts(np.arange(epochs * num_windows, dtype=np.uint64)).reshape(epochs, num_windows).astype(int)
    # Rank of the first sample's window among its epoch's windows, counted from the epoch's cutting offset.
    rank = (ordered[:, 0] - ordered[:, -1]) % (num_windows * 10) // 10
    counts = np.bincount(rank, minlength=num_windows)[1:]
    expected = epochs / (num_windows - 1)
    assert counts.sum() == epochs
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < num_windows - 2 + 5 * np.sqrt(2 * num_windows)


def test_order_is_fixed_for_all_time():
    samples = Samples(shards_of(1000), 10, seed=7)
    assert samples.take(0, 6)[:, 0].tolist() == [26, 56, 136, 326, 546, 486]
    assert samples.take(10**12, 3)[:, 0].tolist() == [766, 566, 316]


def test_a_split_shorter_than_a_window_is_refused(tmp_path):
    shards = TokenShards.open(write(tmp_path / "set", [[5, 6, 7]]), "train")
    assert Samples(shards, 3, 0).take(0, 4).shape == (4, 4)
    with pytest.raises(UserError, match=r"4 tokens.*seq_len: 3 or less"):
        Samples(shards, 4, 0)


documents = st.lists(st.lists(st.integers(4, 70_000), max_size=9), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(documents=documents, seq_len=st.integers(2, 12), shard_tokens=st.integers(1, 20))
def test_evaluation_covers_every_token_once(tmp_path_factory, documents, seq_len, shard_tokens):
    folder = write(tmp_path_factory.mktemp("eval"), documents, shard_tokens, vocab_size=70_001)
    inputs, targets = eval_windows(TokenShards.open(folder, "val"), seq_len)
    assert inputs.shape == targets.shape and inputs.shape[1] == seq_len
    assert inputs.dtype == targets.dtype == np.int64
    counted = targets.ravel() != IGNORED
    assert targets.ravel()[counted].tolist() == [token for ids in documents for token in ids]
    # Every counted target is predicted from the token before it, the first of a document from an end token.
    stream = [END, *(token for ids in documents for token in [*ids, END])]
    assert inputs.ravel()[: len(stream) - 1].tolist() == stream[:-1]


@settings(max_examples=50, deadline=None)
@given(documents=documents, shard_tokens=st.integers(1, 20), start=st.integers(0, 99), count=st.integers(1, 99))
def test_reading_does_not_see_the_borders_of_files(tmp_path_factory, documents, shard_tokens, start, count):
    folder = write(tmp_path_factory.mktemp("read"), documents, shard_tokens, vocab_size=70_001)
    shards = TokenShards.open(folder, "train")
    stream = [token for ids in documents for token in [*ids, END]]
    assert shards.num_tokens == len(stream)
    assert all(len(array) <= shard_tokens for array in shards.arrays)
    assert shards.read(start, count).tolist() == [stream[(start + i) % len(stream)] for i in range(count)]


@pytest.mark.parametrize(("vocab_size", "item_bytes"), [(65536, 2), (65537, 4)])
def test_tokens_take_two_bytes_where_they_fit(tmp_path, vocab_size, item_bytes):
    folder = write(tmp_path / "set", [[vocab_size - 1, 5]], vocab_size=vocab_size)
    assert (folder / "train-00000.bin").stat().st_size == 3 * item_bytes
    shards = TokenShards.open(folder, "train")
    assert shards.read(0, 3).tolist() == [vocab_size - 1, 5, END]
    assert (shards.vocab_size, shards.end_token, shards.num_text_bytes, shards.num_documents) == (vocab_size, END, 2, 1)


def test_broken_folders_are_named(tmp_path):
    folder = write(tmp_path / "set", [[5] * 20])
    shard = folder / "train-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train-00001\.bin: 13 bytes, meta\.json says 14; delete .*set"):
        TokenShards.open(folder, "train")
    TokenShards.open(folder, "val")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin: the token file is missing"):
        TokenShards.open(folder, "train")
    (folder / "meta.json").write_text('{"splits": {}}')
    with pytest.raises(UserError, match=r"meta\.json: 'train' is missing"):
        TokenShards.open(folder, "train")
    (folder / "meta.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"meta\.json: cannot be read"):
        TokenShards.open(folder, "train")
    with pytest.raises(UserError, match="not a prepared corpus"):
        TokenShards.open(tmp_path, "train")


def test_data_is_read_without_torch():
    code = "import sys, wastenot.launch.data, wastenot.launch.corpus; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
