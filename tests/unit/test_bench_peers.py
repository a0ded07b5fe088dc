"""Every peer of `bench train` computes the same function of the same weights, and one that does not is not timed."""

import dataclasses

import pytest
import torch

from wastenot.launch.errors import UserError
from wastenot.moe.config import ModelConfig, MoEConfig
from wastenot.tools.bench import agreement, train
from wastenot.tools.bench.cases import Case, cases, make_weights
from wastenot.tools.bench.peers import megatron, roster
from wastenot.tools.bench.peers.remote import Remote
from wastenot.tools.bench.peers.roster import ENTRIES, OURS, REFERENCE, Entry, LeftOut, make_step, start
from wastenot.tools.bench.step import MasterAdamW

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(top_k=2, **changes):
    moe = MoEConfig(experts=4, d_expert=32)
    model = ModelConfig(vocab_size=64, d_model=32, layers=2, heads=4, kv_heads=2, moe=moe, init_std=0.2)
    return dataclasses.replace(Case(name="tiny", model=model, top_k=top_k, batch=2, seq_len=16), **changes)


def entry(name):
    return next(entry for entry in ENTRIES if entry.name == name)


def started(name, case):
    """The contender, where this machine has its package."""
    try:
        return start(entry(name), case)
    except LeftOut as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def reference():
    return started(REFERENCE, tiny()).probe()


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
# Megatron-Core and DeepSpeed warn about CUDA libraries that a CPU does not have.
@pytest.mark.filterwarnings("ignore")
def test_peer_agrees_with_the_reference_and_trains(name, reference):
    contender = started(name, tiny())
    try:
        loss, norm = contender.probe()
        assert loss == pytest.approx(reference[0], rel=1e-5)
        assert norm == pytest.approx(reference[1], rel=1e-5)
        assert contender.run() > 0
        stepped, _ = contender.probe()
        assert stepped < loss, "one AdamW step on the batch lowers its loss"
    finally:
        contender.close()


@pytest.mark.parametrize("name", [OURS, "transformers grouped_mm", "deepspeed"])
def test_peer_agrees_with_more_than_two_choices(name):
    case = tiny(top_k=3)
    expected = started(REFERENCE, case).probe()
    assert started(name, case).probe() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
@pytest.mark.filterwarnings("ignore")
def test_peer_computes_in_bf16_close_to_the_reference_in_fp32(name):
    tame = tiny(model=dataclasses.replace(tiny().model, init_std=0.05))
    expected = agreement.expected_of(tame, "train")
    contender = started(name, dataclasses.replace(tame, dtype="bf16"))
    try:
        found = contender.probe()
        assert agreement.compare(found, expected, "bf16").agrees
        assert found != pytest.approx(expected, rel=1e-6), "bf16 shows"
        assert contender.run() > 0
    finally:
        contender.close()


def test_small_steps_reach_bf16_weights_through_fp32_copies():
    weight = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(weight.weight)
    optimizer = MasterAdamW(weight)
    # AdamW walks 1e-6 a step where bf16 next to 1 has gaps of 0.004: only the copy can keep the sum.
    for _ in range(3):
        weight.weight.grad = torch.ones_like(weight.weight)
        optimizer.step()
    assert weight.weight.item() == 1
    assert optimizer.masters[0].item() == pytest.approx(1 - 3e-6, abs=5e-7)


@pytest.mark.parametrize("found", [(1.002, 1.0), (1.0, 1.03), (float("nan"), 1.0), (1.0, float("nan"))])
def test_what_leaves_the_band_of_bf16_disagrees(found):
    assert agreement.compare((1.0009, 0.981), (1.0, 1.0), "bf16").agrees
    assert not agreement.compare((1.0009, 0.981), (1.0, 1.0), "fp32").agrees
    assert not agreement.compare(found, (1.0, 1.0), "bf16").agrees


def test_weights_are_a_pure_function_of_the_case():
    once, again = make_weights(tiny()), make_weights(tiny())
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["lm_head.weight"], make_weights(tiny(seed=1))["lm_head.weight"])


def test_quick_is_two_cases_and_the_rest_three():
    assert [case.name for case in cases(True)] == ["few experts", "fine-grained"]
    assert [case.name for case in cases(False)] == ["few experts", "fine-grained", "wide"]


def test_contender_that_disagrees_is_not_timed(monkeypatch):
    def start_wrong(wanted, case):
        return start(wanted, tiny(seed=5) if wanted.name == "transformers grouped_mm" else case)

    monkeypatch.setattr(train, "start", start_wrong)
    entries = (entry(OURS), entry(REFERENCE), entry("transformers grouped_mm"))
    rows, goals = train.run_case(tiny(), entries, rounds=2, warmup=0, say=lambda text: None)
    ours, plain, wrong = rows
    assert ours["tokens_per_second"] > 0 and plain["wastenot_speedup"] > 0
    assert wrong["tokens_per_second"] is None and wrong["seconds_per_step"] is None
    assert wrong["loss_difference"] > agreement.TOLERANCES["fp32"][0]
    assert "not timed" in wrong["why_not"]
    measured = next(goal for goal in goals if "peers measured" in goal.metric)
    assert (measured.value, measured.met) == (1, False)


def test_peer_that_is_not_installed_is_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(roster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LeftOut, match=r"deepspeed is not installed: pip install 'wastenot\[bench\]'"):
        start(entry("deepspeed"), tiny())


def test_without_the_reference_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(roster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"transformers eager is the reference, and it cannot run: .*pip install"):
        train.run_case(tiny(), ENTRIES, rounds=1, warmup=0, say=lambda text: None)


def test_megatron_outside_a_checkout_is_left_out_and_said_so(monkeypatch, tmp_path):
    monkeypatch.setattr(megatron, "SHIM", tmp_path / "megatron_cpu_shim.py")
    with pytest.raises(LeftOut, match="needs a source checkout"):
        start(entry("megatron-core"), tiny())


def test_failure_in_another_process_is_told():
    with pytest.raises(RuntimeError, match="no_such_peer"):
        Remote("test", make_step, Entry(name="none", module="no_such_peer"), tiny())
