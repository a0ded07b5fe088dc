"""Bad configurations through the command line: exit code 2, one clear message on stderr, nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from wastenot.launch.config import LoopConfig, TrainConfig
from wastenot.launch.layout_rules import world_rules
from wastenot.moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.rectify import own_experts
from wastenot.moe.trace import write_trace
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import local_experts
from wastenot.parallel.mesh import Axis
from wastenot.tools.cli import main

SLOTS = "router.capacity_factor=1"
UNLIKE = "model.moe.per_layer=[8,6,0,4]"
PIPELINE, SCHEDULE, FILLED = "parallel.pipeline", "parallel.schedule", "-s train.accumulate=2"

# What is typed after `-s`, over the defaults; the path to change; what the message offers instead.
BAD_SETTINGS = [
    ("train.stepz=3", "train.stepz", "did you mean train.steps?"),
    ("lr=3e-4", "lr", "did you mean optimizer.lr?"),
    ("train.steps=many", "train.steps", "25MiB, 1.5M or 10k"),
    ("train.steps=2.5", "train.steps", "use 2 or 3"),
    ("train.steps=0", "train.steps", "use 1 or more"),
    ("train.deterministic=on", "train.deterministic", "nearest: true"),
    ("train.precision=fp8", "train.precision", "nearest: fp"),
    ("train.seed=1e30", "train.seed", "use at most 9223372036854775807"),
    ("optimizer.lr=-1", "optimizer.lr", "use for example 3e-4"),
    ("optimizer.lr=.inf", "optimizer.lr", "use for example 0.1 or 3e-4"),
    ("optimizer.name=adam", "optimizer.name", "adamw"),
    ("router.score=softmaxx", "router.score", "nearest: softmax"),
    ("router.top_k=9", "router.top_k", "use at most 8"),
    ("router.groups=3", "router.groups", "use 2"),
    ("router.groups=8 -s router.top_k=3", "router.top_groups", "use 3 or more"),
    ("router.top_groups=2", "router.top_groups", "use at most 1"),
    ("router.capacity_factor=0", "router.capacity_factor", "use a positive factor or null"),
    ("router.capacity_factor=.nan", "router.capacity_factor", "is not a number (0.1, 3e-4) or null"),
    ("router.capacity_factor=1e300", "router.capacity_factor", "use at most 1000000, or null"),
    ("router.kind=uniform", "router.balance_loss", "use 0.0"),
    ("router.kind=skewed -s router.balance_loss=0 -s router.bias_update=1e-3", "router.bias_update", "use 0.0"),
    ("router.skew=2", "router.skew", "use 1.0"),
    ("router.top_k=1 -s router.detach=false", "router.detach", "use detach: true or normalize: none"),
    ("router.emulate={sources: 4}", "router.emulate.owners", "give a whole number"),
    ("router.emulate={sources: 4, owners: 3}", "router.emulate.owners", "use 2"),
    ("router.emulate={sources: 3, owners: 2}", "router.emulate.sources", "use 2"),
    ("router.emulate={sources: 1, owners: 2} -s parallel.expert=2", "router.emulate.sources", "use 2"),
    ("router.emulate={sources: 16, owners: 2} -s train.eval_batch=24", "train.eval_batch", "use 16 or 32"),
    ("router.rectify.intra=true", "router.rectify", "set one, for example 1.0, or intra: false and fill: false"),
    ("router.rectify.fill=yes -s router.capacity_factor=1", "router.rectify.fill", "nearest: true"),
    ("router.rectify.fil=true", "router.rectify.fil", "did you mean router.rectify.fill?"),
    ("router.rectify.fill=true -s router.capacity_factor=0", "router.capacity_factor", "use a positive factor or null"),
    ("router.rectify.intra=true -s router.capacity_factor=-0.5", "router.capacity_factor", "use a positive factor"),
    ("router.rectify.select=all", "router.rectify.select", "has no effect without intra: true; use any"),
    ("router.rectify={intra: true, select: some} -s router.capacity_factor=1", "router.rectify.select", "any, all"),
    ("router.rectify.capacity=0.5", "router.rectify.capacity", "has no effect without intra: true; use null"),
    ("router.rectify={intra: true, capacity: 1.5} -s router.capacity_factor=1", "router.rectify.capacity", "use 1.0"),
    ("router.rectify={intra: true, capacity: 0} -s router.capacity_factor=1", "router.rectify.capacity", "use 0.25"),
    ("router.rectify.fill_ranks=2", "router.rectify.fill_ranks", "has no effect without fill: true; use 1"),
    (f"router.rectify={{fill: true, fill_ranks: 0}} -s {SLOTS}", "router.rectify.fill_ranks", "use 1 or more"),
    (f"router.rectify={{fill: true, fill_ranks: 7}} -s {SLOTS}", "router.rectify.fill_ranks", "use at most 6"),
    (f"router.rectify.fill=true -s router.top_k=8 -s {SLOTS}", "router.rectify.fill_ranks", "use rectify.fill: false"),
    (
        f"router.groups=8 -s router.top_groups=2 -s router.rectify.fill=true -s {SLOTS}",
        "router.top_groups",
        "fewer than top_k: 2 and its fill_ranks; use 3 or more",
    ),
    (
        f"model.moe.dispatch=padded -s router.rectify.intra=true -s {SLOTS} -s parallel.expert=2 -s parallel.data=4 "
        "-s router.emulate={sources: 4, owners: 4}",
        "model.moe.dispatch",
        "use ragged",
    ),
    ("router.kind=replay -s router.balance_loss=0", "router.trace", "kind: replay needs a file"),
    ("router.trace=run.yaml", "router.trace", "others none"),
    ("router.kind=replay -s router.balance_loss=0 -s router.trace=nowhere", "router.trace", "records one"),
    ("router.kind=replay -s router.balance_loss=0 -s router.trace=run.yaml", "router.trace", "cannot be read"),
    ("router.kind=skewed -s router.balance_loss=0 -s router.skew=-1", "router.skew", "use 0 (uniform) or more"),
    ("model.moe.dispatch=padded", "model.moe.dispatch", "use 1.25 there, or ragged here"),
    ("model.moe.every=5", "model.moe.every", "use every: 4, or moe: null"),
    ("model.moe.first_dense=4", "model.moe.first_dense", "use first_dense: 3, or moe: null"),
    ("model.moe.d_expert=30", "model.moe.d_expert", "use 28 or 32"),
    ("model.d_model=36 -s train.precision=bf16 -s model.heads=1", "model.d_model", "use 32 or 40"),
    ("model.d_head=63", "model.d_head", "use an even width"),
    ("model.vocab_size=100", "model.vocab_size", "use 2048, or 0"),
    ("model.moe=null -s parallel.expert=2", "parallel.expert", "use 1"),
    ("parallel.expert=3", "parallel.expert", "use 2"),
    (
        f"{UNLIKE} -s parallel.expert=4",
        "parallel.expert",
        "the 6 experts that model.moe.per_layer gives layer 1; use 2",
    ),
    (
        f"{UNLIKE} -s router.top_k=5",
        "router.top_k",
        "the 4 experts that model.moe.per_layer gives layer 3; use at most 4",
    ),
    (
        f"{UNLIKE} -s router.top_k=4 -s router.rectify.fill=true -s {SLOTS}",
        "router.rectify.fill_ranks",
        "experts that model.moe.per_layer gives layer 3; use rectify.fill: false",
    ),
    (f"{UNLIKE} -s router.groups=4", "router.groups", "model.moe.per_layer gives layer 1; use 2"),
    (f"{UNLIKE} -s router.groups=2 -s router.top_k=3", "router.top_groups", "1 of 2 groups hold 2 experts"),
    (
        f"{UNLIKE} -s router.emulate={{sources: 8, owners: 4}}",
        "router.emulate.owners",
        "model.moe.per_layer gives layer 1; use 2",
    ),
    (f"{UNLIKE} -s recompute.mode=lynx", "model.moe.per_layer", "layer 2 has no feed-forward network, of which lynx"),
    (
        "model.moe.per_layer=[8,8,4,8] -s recompute.mode=lynx",
        "model.moe.per_layer",
        "layers have 4 to 8 experts, of which lynx has no plan; use recompute.mode: full or selective",
    ),
    (
        "model.moe.per_layer=[0,0,0,0] -s parallel.expert=2",
        "parallel.expert",
        "model.moe.per_layer gives no layer any; use 1",
    ),
    ("model.moe.per_layer=[8,8,8]", "model.moe", "use for example [8, 8, 8, 8], or layers: 3"),
    ("model.moe.per_layer=[8,8,8] -s model.layers=2", "model.moe", "use for example [8, 8], or layers: 3"),
    ("model.moe.per_layer=[6,6,6,6]", "model.moe.experts", "use 6"),
    ("model.moe.dense=[0]", "model.moe.dense", "use []"),
    ("parallel.expert=2 -s train.nproc=3", "train.nproc", "use 2 or 4"),
    ("parallel.data=4 -s parallel.expert=2 -s train.nproc=2", "train.nproc", "use 4, or 0"),
    ("parallel.data=3 -s parallel.expert=2", "parallel.expert", "3 ranks of a stage"),
    ("parallel.tensor=0", "parallel.tensor", "use 1 or more"),
    ("recompute.mode=ful", "recompute.mode", "nearest: full"),
    ("recompute=selective", "recompute", "mode"),
    ("parallel.pipeline=5 -s train.batch=40 -s train.accumulate=5", "parallel.pipeline", "4 layers; use 4"),
    (f"{PIPELINE}=4 -s {SCHEDULE}=interleaved -s train.accumulate=4", "parallel.pipeline", "4 layers; use 2"),
    (f"{PIPELINE}=2 -s {SCHEDULE}=zb-h1 -s parallel.shard=2 {FILLED}", SCHEDULE, "use 1f1b"),
    (f"{PIPELINE}=2 -s {SCHEDULE}=interleaved -s parallel.chunks=3 {FILLED}", "parallel.pipeline", "6 stages"),
    (f"{PIPELINE}=2", "train.accumulate", "use 2"),
    (f"{PIPELINE}=4 -s train.accumulate=3 -s train.batch=12", "train.accumulate", "use 4"),
    (f"{PIPELINE}=4 -s train.batch=3", "train.accumulate", "use 4, with a train.batch that is a multiple"),
    (f"{PIPELINE}=2 -s {SCHEDULE}=dualpipev {FILLED}", "train.accumulate", "use 4"),
    (f"{PIPELINE}=2 -s {SCHEDULE}=interleaved -s train.accumulate=1", "train.accumulate", "use 2"),
    (f"{PIPELINE}=2 -s {SCHEDULE}=zb-h1 -s train.accumulate=5 -s train.batch=20", "train.accumulate", "use 4"),
    (f"{PIPELINE}=2 -s {SCHEDULE}=1f1c {FILLED}", "parallel.schedule", "nearest: 1f1b"),
    (f"{PIPELINE}=2 -s parallel.chunks=2 {FILLED}", "parallel.chunks", "use 1, or schedule: interleaved"),
    (
        f"{PIPELINE}=2 -s {SCHEDULE}=dualpipev -s parallel.chunks=3 -s train.accumulate=4",
        "parallel.chunks",
        "use 2 or auto",
    ),
    (f"{PIPELINE}=2 -s {SCHEDULE}=interleaved -s parallel.chunks=1 {FILLED}", "parallel.chunks", "or schedule: 1f1b"),
    (f"{PIPELINE}=2 -s parallel.cut=[3,2] {FILLED}", "parallel.cut", "use for example [2, 2], or []"),
    (f"{PIPELINE}=2 -s parallel.cut=[2,1,1] {FILLED}", "parallel.cut", "use for example [2, 2], or []"),
    (f"{PIPELINE}=2 -s parallel.cut=[4,0] {FILLED}", "parallel.cut", "give every stage 1 or more"),
    ("parallel.cut=[2,2]", "parallel.cut", "use for example [4], or []"),
    (f"{PIPELINE}=2 -s model.tie_embeddings=true {FILLED}", "model.tie_embeddings", "use false"),
    (f"{PIPELINE}=2 {FILLED} -s train.nproc=3", "train.nproc", "use 2 or 4"),
    ("parallel.shard=2 -s parallel.tensor=2 -s train.nproc=6", "train.nproc", "use 4 or 8"),
    ("parallel.tensor=3", "parallel.tensor", "3 ranks cannot share model.heads: 4 equally; use 2"),
    ("parallel.tensor=4 -s model.kv_heads=2", "parallel.tensor", "share model.kv_heads: 2 equally; use 2"),
    ("parallel.tensor=4 -s model.vocab_size=2049 -s model.moe=null -s model.d_ff=5", "parallel.tensor", "use 2"),
    ("parallel.tensor=2 -s data.seq_len=255", "data.seq_len", "use 254 or 256"),
    ("parallel.tensor=2 -s router.emulate={sources: 4, owners: 4}", "router.emulate", "use null"),
    ("parallel.tensor=2 -s optimizer.name=muon", "optimizer.name", "use adamw"),
    (
        "parallel.tensor=2 -s optimizer.name=adapprox -s optimizer.adapprox.momentum=int8 -s model.d_model=128",
        "optimizer.adapprox.momentum",
        "use bf16",
    ),
    ("parallel.piece_bytes=-1", "parallel.piece_bytes", "use 0 (never cut), a size, or auto"),
    ("parallel.bucket_bytes=8GiBB", "parallel.bucket_bytes", "25MiB, 1.5M or 10k"),
    ("parallel.data=8 -s train.batch=20", "train.batch", "use 16 or 24"),
    ("parallel.expert=8 -s train.eval_batch=4", "train.eval_batch", "use 8"),
    ("schedule.warmup_steps=2k", "schedule.warmup_steps", "use at most 1000"),
    ("schedule={kind: wsd, warmup_steps: 500, decay_ratio: 0.6}", "schedule.decay_ratio", "use at most 0.5"),
    ("data.tokenizer=bpe:100", "data.tokenizer", "use bpe:257 or more"),
    ("data.tokenizer=bytez", "data.tokenizer", "nearest: bytes"),
    ("data.corpus=shakespear", "data.corpus", "nearest: shakespeare"),
    ("data.val_fraction=1", "data.val_fraction", "use for example 0.05"),
    ("log.profile=[990, 1010]", "log.profile", "use [990, 1000]"),
    ("log.profile=[3]", "log.profile", "use for example [10, 12]"),
    ("log.dir=''", "log.dir", "use for example log"),
    ("checkpoint.resume=atuo", "checkpoint.resume", "nearest: auto"),
    ("kernels=torch -s train.precision=fp64", "kernels", "use reference or auto"),
    ("kernels=triton -s train.precision=fp64", "kernels", "use reference or auto"),
    ("kernels=cuda", "kernels", "one of auto, triton, torch, reference"),
    ("parallel.shard=2 -s optimizer.name=muon", "optimizer.name", "use adamw or adapprox"),
    ("parallel.shard=2 -s optimizer.name=adafactor", "optimizer.name", "use adamw or adapprox"),
    (
        "parallel.shard=2 -s optimizer.name=adapprox -s optimizer.adapprox.momentum=int8",
        "optimizer.adapprox.momentum",
        "use bf16",
    ),
    ("parallel.shard=4 -s model.moe.d_expert=25 -s kernels=reference", "model.moe.d_expert", "use 24 or 26"),
    ("parallel.shard=16 -s model.d_model=264 -s model.heads=4", "model.d_model", "use 256 or 272"),
    ("parallel.shard=4 -s parallel.expert=6", "parallel.expert", "use 2"),
    ("parallel.shard=3 -s parallel.data=2 -s parallel.expert=2", "parallel.expert", "use 1"),
]


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative names in the configurations resolve to nothing that happens to lie around."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a run that must fail as bad input does."""
    assert main(["config", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize(("settings", "path", "remedy"), BAD_SETTINGS, ids=[row[0] for row in BAD_SETTINGS])
def test_a_bad_setting_gives_one_line_with_path_and_remedy(
    settings: str, path: str, remedy: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_empty_folder / "run.yaml").write_text("{}")
    arguments = [word for setting in settings.split(" -s ") for word in ("-s", setting)]
    message = error_of(capsys, "run.yaml", *arguments)
    assert "\n" not in message
    where, _, problem = message.partition(f": {path}: ")
    assert where.startswith("run.yaml with -s ")
    assert remedy in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "run.yaml: the file is empty; write {} to take every default"),
        (b"train", "run.yaml: 'train' is not a mapping; its keys are model, router, parallel,"),
        (b"train: [1]", "run.yaml: train: [1] is not a mapping; its keys are steps, batch,"),
        (b"train: {steps: 5\n", "run.yaml:2:1: while parsing a flow mapping"),
        (b"train: {steps: 5, steps: 6}", "run.yaml:1:19: key 'steps' stands here a second time (first in line 1)"),
        (b"a: !!python/name:os.system", "run.yaml:1:4: could not determine a constructor"),
        (b"\xff\xfe\x00", "run.yaml: byte 0 is not UTF-8 text; is this a YAML file?"),
    ],
    ids=["empty", "no mapping", "no section", "open brace", "key twice", "python tag", "binary"],
)
def test_a_bad_file_gives_one_line_with_its_place(
    content: bytes, message: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_empty_folder / "run.yaml").write_bytes(content)
    found = error_of(capsys, "run.yaml")
    assert found.startswith(message)
    assert "\n" not in found


def test_a_file_that_is_not_there_suggests_one_that_is(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean models/mixtral-8x7b?" in error_of(capsys, "models/mixtral-8x7")
    (in_empty_folder / "run").mkdir()
    assert error_of(capsys, "run") == "run: a folder; give a YAML file"
    (in_empty_folder / "run" / "config.yaml").write_text("{}")
    assert error_of(capsys, "run") == "run: a folder; did you mean run/config.yaml?"


def test_a_trace_of_other_experts_is_refused(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace("trace", [np.zeros((5, 4))])
    (in_empty_folder / "run.yaml").write_text("router: {kind: replay, trace: trace, balance_loss: 0}")
    assert error_of(capsys, "run.yaml") == ("run.yaml: router.trace: trace is of 4 experts, the model has 8; use 4")
    assert main(["config", "run.yaml", "-s", "model.moe.experts=4"]) == 0


def test_a_trace_fits_layer_by_layer(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace("trace", [np.zeros((5, 8)), np.zeros((5, 4))])
    (in_empty_folder / "run.yaml").write_text(
        "{model: {moe: {per_layer: [8, 0, 4, 0]}}, router: {kind: replay, trace: trace, balance_loss: 0}}"
    )
    assert main(["config", "run.yaml"]) == 0
    capsys.readouterr()
    # Layer 2 is the third with experts: it begins the trace again.
    found = error_of(capsys, "run.yaml", "-s", "model.moe.per_layer=[8,4,4,0]")
    assert found.endswith("router.trace: trace is of 8 experts, the model has 4; use 8")


def test_no_experts_in_any_layer_are_what_was_asked_for(in_empty_folder: Path) -> None:
    (in_empty_folder / "run.yaml").write_text("model: {moe: {per_layer: [0, 0, 0, 0], dense: [1]}}")
    assert main(["config", "run.yaml"]) == 0


def test_padded_stand_ins_are_refused_exactly_where_they_would_travel() -> None:
    refused = 0
    for expert, data, owners, share in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 6, 8), (1, 2, 3)):
        world, experts = expert * data, 24
        emulate = EmulateConfig(sources=share * world, owners=owners)
        router = RouterConfig(capacity_factor=1.0, rectify=RectifyConfig(intra=True), emulate=emulate)
        config = TrainConfig(
            model=ModelConfig(moe=MoEConfig(experts=experts, dispatch="padded")),
            router=router,
            parallel=ParallelConfig(expert=expert, data=expert * data),
            train=LoopConfig(batch=emulate.sources, eval_batch=emulate.sources),
        )
        travels = False
        for rank in range(world):
            held = local_experts(experts, Axis("expert", expert, rank % expert))
            travels |= not own_experts(experts, held, share, rank, emulate).within(held, share)
        assert [violation.paths[0] for violation in world_rules(config, world)] == ["model.moe.dispatch"] * travels
        refused += travels
    assert refused > 0


def test_a_folder_that_cannot_be_made_is_named(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_empty_folder / "run.yaml").write_text("log: {dir: taken/run}")
    (in_empty_folder / "taken").write_text("")
    assert error_of(capsys, "run.yaml") == (
        "run.yaml: log.dir: 'taken/run' cannot be a folder: taken is a file; use another name"
    )


def test_several_problems_are_counted_and_listed(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_empty_folder / "run.yaml").write_text("router: {top_k: 9}\ntrain: {steps: 0}\noptimiser: {}")
    assert error_of(capsys, "run.yaml").splitlines() == [
        "run.yaml: 3 problems",
        "  train.steps: 0 is too small; use 1 or more",
        "  optimiser: unknown key; did you mean optimizer?",
        "  router.top_k: 9 exceeds model.moe.experts: 8; use at most 8",
    ]
