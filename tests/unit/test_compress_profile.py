"""Profiles: the paper's definitions by hand, planted redundancy, killed and continued, memory as predicted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stock_models import CONFIGS
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.saved_run import write_run
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.compress.calibration import Calibration, packed, padded
from wastenot.moe.compress.criteria import block_scores, coverage, expert_scores, layer_scores
from wastenot.moe.compress.plan import DropPlan
from wastenot.moe.compress.profile import ProfileConfig, measure, profile, read_profile
from wastenot.moe.compress.stock import StockModel
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.mesh import single

LAYERS = 6


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral whose layers differ visibly, in fp64 too."""
    torch.manual_seed(3)
    config = type(CONFIGS["mixtral"])(**{**CONFIGS["mixtral"].to_dict(), "num_hidden_layers": LAYERS})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def text() -> Calibration:
    return packed(torch.randint(0, 64, (1000,), generator=torch.Generator().manual_seed(0)), 20, 12, "random")


def by_hand(model, text: Calibration) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """What every MoE layer reads and makes, and the stream before each block and after the last, in fp64."""
    # Fused experts know no fp64.
    model.set_experts_implementation("eager")
    model = model.double().eval()
    seen: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
    stream: list[torch.Tensor] = []
    hooks = []
    for layer, into in zip(model.model.layers, seen, strict=True):
        hooks += [
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, given, into=into: into.__setitem__("a", given[0].clone())
            ),
            layer.mlp.gate.register_forward_hook(
                lambda _, given, made, into=into: into.update(x=given[0], logits=made[0], g=made[1], chosen=made[2])
            ),
            layer.register_forward_pre_hook(lambda _, given: stream.append(given[0].clone())),
            layer.register_forward_hook(lambda _, given, made, into=into: into.__setitem__("b", made.clone())),
        ]
    with torch.no_grad():
        model(text.tokens_NS)
    for hook in hooks:
        hook.remove()
    return seen, [*stream, seen[-1]["b"]]


def test_scores_and_the_order_of_drops_are_those_of_the_papers_definitions(mixtral, text):
    model, folder = mixtral
    seen, stream = by_hand(model, text)
    found = measure(StockModel(folder), text, ProfileConfig(window=LAYERS, batch=5))

    cosines = {n: cosine_similarity(each["a"], each["b"], dim=-1).mean().item() for n, each in enumerate(seen)}
    assert layer_scores(found) == pytest.approx(cosines, rel=6e-6)

    def order(scores):
        return sorted(scores, key=lambda n: -scores[n])

    assert order(layer_scores(found)) == order(cosines)

    for gap in range(1, LAYERS + 1):
        expected = {
            i: cosine_similarity(stream[i], stream[i + gap], dim=-1).mean().item() for i in range(LAYERS + 1 - gap)
        }
        assert block_scores(found, gap) == pytest.approx(expected, rel=6e-6)
        assert order(block_scores(found, gap)) == order(expected)

    for layer, each in enumerate(seen):
        experts = model.model.layers[layer].mlp.experts
        mass = each["logits"].softmax(-1).mean(0)
        assert expert_scores(found, "mass")[layer] == pytest.approx(mass.tolist(), rel=6e-6)
        for expert in range(mass.numel()):
            tokens, choice = torch.where(each["chosen"] == expert)
            gate, up = (each["x"].view(-1, 16)[tokens] @ experts.gate_up_proj[expert].T).chunk(2, -1)
            norms = ((torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T).norm(dim=-1)
            assert coverage(found)[layer][expert] == len(tokens)
            reap = (each["g"][tokens, choice] * norms).mean().item()
            assert expert_scores(found, "reap")[layer][expert] == pytest.approx(reap, rel=6e-6)
            assert expert_scores(found, "msan")[layer][expert] == pytest.approx((norms**2).mean().item(), rel=6e-6)


def test_padding_counts_in_no_statistic(mixtral, text):
    folder = mixtral[1]
    whole = measure(StockModel(folder), text, ProfileConfig(batch=4))
    longer = padded(text.tokens_NS.tolist(), 27, "padded")
    found = measure(StockModel(folder), longer, ProfileConfig(batch=4))
    assert layer_scores(found) == pytest.approx(layer_scores(whole), rel=6e-6)
    assert coverage(found) == coverage(whole)


def test_d6_an_expert_without_tokens_has_scores_and_ends_nothing(mixtral, text):
    """Defect D6 of the public code: its statistic stays None there."""
    one = Calibration(text.tokens_NS[:1, :1], text.mask_NS[:1, :1], "one token")
    found = measure(StockModel(mixtral[1]), one, ProfileConfig())
    assert min(coverage(found)[0]) == 0
    starved = coverage(found)[0].index(0)
    for criterion in ("reap", "msan", "frequency", "gate"):
        assert expert_scores(found, criterion)[0][starved] == 0


def test_d3_similarities_are_fp32_for_any_number_of_windows(mixtral):
    """Defect D3: above 64 samples the public code takes cosines in bf16, and near ones become the same."""
    tokens = torch.randint(0, 64, (80 * 4,), generator=torch.Generator().manual_seed(1))
    found = measure(StockModel(mixtral[1]), packed(tokens, 4, 80, "many"), ProfileConfig(batch=8))
    in_bf16 = {torch.tensor(score).bfloat16().item() for score in layer_scores(found).values()}
    assert len(set(layer_scores(found).values())) == LAYERS > len(in_bf16)


_CHILD = """
import sys, torch
from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.saved_run import write_run
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.compress.calibration import packed
from wastenot.moe.compress.plan import DropPlan
from wastenot.moe.compress.profile import ProfileConfig, profile
from wastenot.moe.compress.stock import StockModel
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.mesh import single
torch.set_num_threads(1)
text = packed(torch.randint(0, 64, (1000,), generator=torch.Generator().manual_seed(0)), 20, 12, "random")
config = ProfileConfig(window=3, hessians=True, batch=3)
def waits(done, total):
    print(done, flush=True)
    if done == int(sys.argv[3]):
        sys.stdin.read()
profile(StockModel(sys.argv[1]), text, sys.argv[2], config, progress=waits)
"""


def run_child(folder: Path, into: Path, stop_at: int) -> None:
    """Profiles in a process of its own, and kills it once so many layers are done."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), str(into), str(stop_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    done = [line for line in iter(child.stdout.readline, f"{stop_at}\n") if line]
    if stop_at <= LAYERS:
        child.send_signal(signal.SIGKILL)
    else:
        assert done[-1] == f"{LAYERS}\n"
    child.communicate()


def test_a_killed_profile_goes_on_and_ends_byte_for_byte_alike(mixtral, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    child = [sys.executable, "-c", _CHILD, str(mixtral[1])]
    subprocess.run([*child, str(whole), "-1"], check=True, stdout=subprocess.DEVNULL, timeout=120)
    for stop in (1, 3):
        run_child(mixtral[1], killed, stop)
        with pytest.raises(ValueError, match="no finished profile"):
            read_profile(killed)
    # A file that a killed process left half-written.
    (killed / ".state-0004-rank-0.safetensors.partial").write_bytes(b"half")
    subprocess.run([*child, str(killed), "-1"], check=True, stdout=subprocess.DEVNULL, timeout=120)
    files = {path.name for path in whole.iterdir()}
    assert files == {path.name for path in killed.iterdir()}
    for name in files - {"costs.json"}:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert json.loads((killed / "costs.json").read_text())["resumed_at_layer"] == 3


def test_a_folder_of_another_profile_is_left_alone(mixtral, text, tmp_path):
    model = StockModel(mixtral[1])
    profile(model, text, tmp_path / "p", ProfileConfig())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    with pytest.raises(ValueError, match="holds a profile of another config; name a new folder"):
        profile(model, text, tmp_path / "p", ProfileConfig(window=2))
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match="exists and is no profile"):
        profile(model, text, tmp_path / "q", ProfileConfig())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["mine.txt"]


def test_hessians_are_the_sums_of_squares_on_their_diagonals(mixtral, text, tmp_path):
    found = profile(StockModel(mixtral[1]), text, tmp_path / "p", ProfileConfig(hessians=True))
    for which, squares in (("hessian_in_DD", "input_sq_ED"), ("hessian_hidden_FF", "hidden_sq_EF")):
        hessian = found.hessian(2, 1, which)
        torch.testing.assert_close(hessian, hessian.t(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hessian.diagonal().double(), found.layers[2][squares][1], rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="--hessians"):
        profile(StockModel(mixtral[1]), text, tmp_path / "q", ProfileConfig()).hessian(0, 0, "hessian_in_DD")


def test_d8_a_layer_that_loses_all_or_none_is_computed_before_the_next(mixtral, text):
    """Defect D8: the public code skips the forward there, and the next layer sees stale inputs."""
    model = StockModel(mixtral[1])
    start = DropPlan(base=model.fingerprint, shape=model.shape)
    whole = layer_scores(measure(model, text, ProfileConfig()))
    # Nothing to drop: a plan that only orders the experts of layer 1 anew.
    ordered = layer_scores(measure(model, text, ProfileConfig(), plan=replace(start, order={1: (5, 3, 1, 0, 2, 4)})))
    assert ordered == pytest.approx(whole, rel=6e-6)
    under = layer_scores(measure(model, text, ProfileConfig(), plan=replace(start, layers=(1,))))
    stock = AutoModelForCausalLM.from_pretrained(mixtral[1])
    stock.model.layers[1].mlp.register_forward_hook(lambda _, given, made: torch.zeros_like(made))
    seen, _ = by_hand(stock, text)
    expected = {n: cosine_similarity(each["a"], each["b"], dim=-1).mean().item() for n, each in enumerate(seen)}
    del expected[1]
    assert under == pytest.approx(expected, rel=6e-6)


_MEMORY = """
import json, sys, torch
from pathlib import Path
from wastenot.launch.streamed import open_streamed
from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.saved_run import write_run
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.compress.calibration import packed
from wastenot.moe.compress.plan import DropPlan
from wastenot.moe.compress.profile import ProfileConfig, measure, profile
torch.set_num_threads(1)
windows, seq_len, window, batch, hessians = json.loads(sys.argv[3])
model = open_streamed(sys.argv[1])
# What libraries take when they are first used is no part of it.
measure(model, packed(torch.arange(64), 16, 4, "little"), ProfileConfig())
text = packed(torch.arange(windows * seq_len) % 257, seq_len, windows, "much")
profile(model, text, sys.argv[2], ProfileConfig(window=window, batch=batch, hessians=hessians))
"""


@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((256, 8, 512), (64, 512, 4, 4, False)),
        ((512, 16, 256), (64, 512, 1, 4, False)),
        ((512, 16, 256), (32, 256, 1, 4, True)),
    ],
)
def test_memory_is_as_predicted_within_15_percent(size, how, tmp_path):
    d_model, experts, d_expert = size
    moe = MoEConfig(experts=experts, d_expert=d_expert)
    config = TrainConfig(
        model=ModelConfig(vocab_size=257, d_model=d_model, layers=3, heads=4, moe=moe),
        router=RouterConfig(top_k=2),
        data=DataConfig(tokenizer="bytes", seq_len=16),
        log=LogConfig(dir=str(tmp_path / "run")),
    )
    write_run(config, build_decoder(config.model, config.router, single()), byte_tokenizer(), "a test")
    words = [str(tmp_path / "run"), str(tmp_path / "profile"), json.dumps(how)]
    subprocess.run([sys.executable, "-c", _MEMORY, *words], check=True, timeout=300)
    costs = json.loads((tmp_path / "profile" / "costs.json").read_text())
    assert costs["predicted_bytes"] == pytest.approx(costs["peak_bytes"], rel=0.15)
