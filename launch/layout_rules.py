"""Rules of how ranks are laid out (docs/parallelism.md): degrees, and what goes with them. Torch-free."""

from __future__ import annotations

import math

from ..moe.config import nearest_divisor
from ..parallel.config import AXES, ParallelConfig
from .config import TrainConfig
from .errors import Violation
from .expert_counts import divides_all, unlike_layers

STEPS_PARTS = ("adamw", "adapprox")
"""Optimizers that step a part of a weight as they would the whole. Tried on two and four ranks: adafactor and came
fail where they mix parts with whole tensors (apollo does so too, by reading), muon's bf16 products over ranks differ by
3 % of a step, and adamw8bit has other blocks of codes in parts, which no other layout could load."""


def experts_split_over_ranks(config: TrainConfig) -> list[Violation]:
    moe, degree = config.model.moe, config.parallel.expert
    if degree > 1 and (moe is None or (moe.per_layer and not any(moe.per_layer))):
        path = "model.moe" if moe is None else "model.moe.per_layer"
        none = f"{path} is null" if moe is None else f"{path} gives no layer any"
        message = f"{degree} ranks would share experts, but {none}; use 1 (and data for more ranks)"
        return [Violation(("parallel.expert", path), message)]
    return divides_all(config, degree, "parallel.expert")


def layout_is_consistent(config: TrainConfig) -> list[Violation]:
    """`nproc` makes the world that `parallel` describes, and that world divides the work."""
    parallel, nproc = config.parallel, config.train.nproc
    fewest = parallel.world()
    if nproc and (nproc % fewest if parallel.data == "auto" else nproc != fewest):
        asked = {axis: getattr(parallel, axis) for axis in (*AXES, "expert")}
        named = [axis for axis, degree in asked.items() if degree not in (1, "auto")]
        degrees = " x ".join(f"{axis} {asked[axis]}" for axis in named if axis != "expert")
        over = f", with experts over {parallel.expert}" if parallel.expert > 1 else ""
        fix = f"use {fewest}, or 0 to follow parallel"
        if parallel.data == "auto":
            fix = f"use {multiples(nproc, fewest)}"
        paths = ("train.nproc", *(f"parallel.{axis}" for axis in named))
        return [Violation(paths, f"{nproc} ranks are not {degrees or 'what parallel says'}{over}; {fix}")]
    return world_rules(config, parallel.world(nproc or None))


def world_rules(config: TrainConfig, world: int) -> list[Violation]:
    """What a world of `world` ranks asks; the trainer checks again with the ranks that were started."""
    parallel, train, emulate = config.parallel, config.train, config.router.emulate
    layout = tuple(f"parallel.{axis}" for axis in AXES if axis == "data" or getattr(parallel, axis) > 1)
    layout = (*layout, "parallel.expert", "train.nproc")
    found = _ranks_divide(parallel, world)
    if found:
        return found
    readers, stage = world // (parallel.pipeline * parallel.tensor), parallel.stage(world)
    portion = train.accumulate * readers
    if train.batch % portion:
        message = (
            f"{train.batch} sequences do not split into accumulate {train.accumulate} x {readers} ranks; "
            f"use {multiples(train.batch, portion)}"
        )
        found.append(Violation(("train.batch", "train.accumulate", *layout), message))
    if train.eval_batch % readers:
        fix = multiples(train.eval_batch, readers)
        message = f"{train.eval_batch} sequences do not split over {readers} ranks; use {fix}"
        found.append(Violation(("train.eval_batch", *layout), message))
    if config.model.moe is not None and emulate is not None and emulate.sources % stage:
        fix = multiples(emulate.sources, stage)
        message = f"{emulate.sources} is not a multiple of the {stage} ranks; use {fix}"
        found.append(Violation(("router.emulate.sources", *layout), message))
    elif not found:
        found += _stand_ins_stay(config, stage)
    return found


def _ranks_divide(parallel: ParallelConfig, world: int) -> list[Violation]:
    """The world is the product of the axes, and experts divide the ranks of a stage."""
    fixed = parallel.pipeline * parallel.shard * parallel.tensor
    if parallel.data != "auto" and parallel.world() != world:
        fix = f"{world // fixed} or auto" if world % fixed == 0 else "auto"
        more = [axis for axis in AXES if axis != "data" and getattr(parallel, axis) > 1]
        others = "".join(f" x {axis} {getattr(parallel, axis)}" for axis in more)
        return [Violation(("parallel.data",), f"{parallel.data}{others} is not the {world} ranks; use {fix}")]
    left = world
    for axis in ("pipeline", "tensor", "shard"):
        degree = getattr(parallel, axis)
        if left % degree:
            message = f"{degree} does not divide {left} of the {world} ranks; use {nearest_divisor(left, degree)}"
            return [Violation((f"parallel.{axis}",), message)]
        left //= degree
    stage = parallel.stage(world)
    if stage % parallel.expert:
        where = f"the {stage} ranks" if parallel.pipeline == 1 else f"the {stage} ranks of a stage"
        message = f"{parallel.expert} does not divide {where}; use {nearest_divisor(stage, parallel.expert)}"
        return [Violation(("parallel.expert",), message)]
    return []


def _stand_ins_stay(config: TrainConfig, world: int) -> list[Violation]:
    """Padded dispatch has no slots for stand-ins, so emulated owners must be the ranks that really hold the experts."""
    moe, emulate, degree = config.model.moe, config.router.emulate, config.parallel.expert
    if moe is None or emulate is None or moe.dispatch != "padded" or not config.router.rectify.intra:
        return []
    blocks, owners = emulate.sources // world, emulate.owners
    if divides_all(config, owners, "router.emulate.owners") or (
        all(source % owners * degree // owners == source // blocks % degree for source in range(emulate.sources))
        and owners >= degree
    ):
        return []
    message = (
        f"padded has no slots for stand-ins on other ranks, where router.emulate puts them with {degree} expert "
        "rank(s); use ragged"
    )
    return [Violation(("model.moe.dispatch", "router.emulate", "parallel.expert"), message)]


def tensor_ranks_share(config: TrainConfig) -> list[Violation]:
    """Tensor ranks hold equal parts of heads and sequences, and something of every dense weight."""
    model, degree = config.model, config.parallel.tensor
    if degree == 1:
        return []
    heads = math.gcd(model.heads, model.num_kv_heads)
    if heads % degree:
        name = "heads" if model.heads % degree else "kv_heads"
        count, fix = getattr(model, name) or model.heads, nearest_divisor(heads, degree)
        message = f"{degree} ranks cannot share model.{name}: {count} equally; use {fix}"
        return [Violation(("parallel.tensor", f"model.{name}"), message)]
    for path, size in _dense_widths(config).items():
        if size and -(-size // degree) * (degree - 1) >= size:
            fix = max(n for n in range(1, degree) if heads % n == 0 and -(-size // n) * (n - 1) < size)
            message = f"{degree} ranks would not all have a part of {path}: {size}; use {fix}"
            return [Violation(("parallel.tensor", path), message)]
    if config.data.seq_len % degree:
        fix = multiples(config.data.seq_len, degree)
        message = f"{config.data.seq_len} tokens do not split over parallel.tensor: {degree} ranks; use {fix}"
        return [Violation(("data.seq_len", "parallel.tensor"), message)]
    return []


def _dense_widths(config: TrainConfig) -> dict[str, int]:
    """Sizes that tensor ranks cut, unevenly where they must; 0 where something else decides it."""
    model, moe = config.model, config.model.moe
    widths = {"model.vocab_size": model.vocab_size}
    if any(map(model.is_dense, range(model.layers))):
        widths["model.d_ff"] = model.dense_width
    if moe is not None:
        widths["model.moe.shared_experts"] = moe.shared_experts * moe.d_expert
    return widths


def emulation_is_not_cut(config: TrainConfig) -> list[Violation]:
    """Emulated ranks hold whole sequences (METHODS R10), of which a tensor rank holds parts."""
    degree = config.parallel.tensor
    if degree == 1 or config.model.moe is None or config.router.emulate is None:
        return []
    message = f"emulated ranks hold whole sequences, parallel.tensor: {degree} ranks parts of each; use null"
    return [Violation(("router.emulate", "parallel.tensor"), message)]


def experts_split_over_storage(config: TrainConfig) -> list[Violation]:
    """Ranks that share the storage of an expert hold as many rows of its matrices, 2 d_expert and d_model, each."""
    moe, parallel = config.model.moe, config.parallel
    if moe is None:
        return []
    ranks, found = parallel.expert_shard, []
    for path, rows, step in (
        ("model.moe.d_expert", moe.d_expert, ranks // math.gcd(2, ranks)),
        ("model.d_model", config.model.d_model, ranks),
    ):
        if rows % step:
            message = f"{rows} rows of an expert do not split over the {ranks} ranks that share its storage; use "
            paths = (path, "parallel.shard", "parallel.expert")
            found.append(Violation(paths, message + multiples(rows, step)))
    return found


def shared_storage_runs_whole_backwards(config: TrainConfig) -> list[Violation]:
    """FSDP2 frees a block's weights after the gradients of inputs; those of weights, later, need them again."""
    parallel = config.parallel
    if parallel.shard == 1 or parallel.pipeline == 1 or parallel.schedule not in ("zb-h1", "dualpipev"):
        return []
    message = f"{parallel.schedule} splits backwards, which parallel.shard: {parallel.shard} cannot; use 1f1b"
    return [Violation(("parallel.schedule", "parallel.shard"), message)]


def lynx_plans_whole_layers(config: TrainConfig) -> list[Violation]:
    if config.recompute.mode != "lynx":
        return []
    if config.parallel.shard > 1:
        message = (
            f"{config.parallel.shard} ranks gather weights for one use, in which nothing else is known to be there"
        )
        return [Violation(("parallel.shard", "recompute.mode"), f"{message}; use recompute.mode: full, or shard: 1")]
    if differing := unlike_layers(config.model):
        message = f"{differing}, of which lynx has no plan; use recompute.mode: full or selective"
        return [Violation(("model.moe.per_layer", "recompute.mode"), message)]
    if config.train.precision == "fp64":
        return [Violation(("train.precision", "recompute.mode"), "no plan is made for fp64; use fp32 or bf16")]
    return []


def optimizer_steps_parts(config: TrainConfig) -> list[Violation]:
    """Where `shard` or `tensor` ranks hold parts of weights, which optimizers step them as one process would."""
    parallel, optimizer = config.parallel, config.optimizer
    axes = {axis: getattr(parallel, axis) for axis in ("shard", "tensor") if getattr(parallel, axis) > 1}
    if not axes:
        return []
    degrees = " and ".join(f"parallel.{axis}: {degree}" for axis, degree in axes.items())
    paths = tuple(f"parallel.{axis}" for axis in axes)
    if optimizer.name not in STEPS_PARTS:
        message = f"{optimizer.name} cannot step weights that {degrees} ranks share; use {' or '.join(STEPS_PARTS)}"
        return [Violation(("optimizer.name", *paths), message)]
    if optimizer.name == "adamw" or optimizer.adapprox.momentum != "int8":
        return []
    if "shard" in axes:
        message = (
            f"int8 has a scale for each of the {parallel.shard} parts of a vector, which no other layout could load"
        )
        return [Violation(("optimizer.adapprox.momentum", *paths), f"{message}; use bf16")]
    # Blocks of codes lie along rows, so matrices cut by columns must be cut between blocks.
    model = config.model
    columns = {"model.heads": model.heads * model.head_width, **_dense_widths(config), "model.vocab_size": 0}
    for path, width in columns.items():
        if width % (parallel.tensor * 128):
            message = f"int8 has blocks of 128 numbers, which {degrees} ranks would cut in a width of {width}; use bf16"
            return [Violation(("optimizer.adapprox.momentum", path, *paths), message)]
    return []


def layers_make_stages(config: TrainConfig) -> list[Violation]:
    """Every stage of the pipeline has a layer, and `cut` is one of all layers."""
    parallel, layers = config.parallel, config.model.layers
    stages, chunks = parallel.num_stages, parallel.num_chunks
    paths = ("parallel.pipeline", "model.layers", "parallel.schedule", "parallel.chunks")
    if stages > layers:
        each = f" x {chunks} chunks" if chunks > 1 else ""
        message = (
            f"{parallel.pipeline} ranks{each} make {stages} stages of {layers} layers; use {layers // chunks or 1}"
        )
        return [Violation(paths if chunks > 1 else paths[:2], message)]
    cut = parallel.cut
    if not cut or (len(cut), sum(cut)) == (stages, layers):
        return []
    each, more = divmod(layers, stages)
    fix = [each + (stage < more) for stage in range(stages)]
    message = f"{list(cut)} does not make {layers} layers in {stages} stage(s); use for example {fix}, or []"
    return [Violation(("parallel.cut", *paths), message)]


def micro_batches_fill_pipeline(config: TrainConfig) -> list[Violation]:
    """The schedule has an order for the micro-batches of a step."""
    parallel, train = config.parallel, config.train
    if parallel.runs(train.accumulate):
        return []
    looked_at = range(1, min(train.batch, 2**16) + 1)
    divisors = [number for number in looked_at if train.batch % number == 0 and parallel.runs(number)]
    if divisors:
        fix = f"use {min(divisors, key=lambda number: (abs(number - train.accumulate), number))}"
    else:
        number = parallel.num_stages
        fix = f"use {number}, with a train.batch that is a multiple of it"
    message = (
        f"{train.accumulate} micro-batches have no order in {parallel.schedule} on {parallel.pipeline} ranks with "
        f"{parallel.num_chunks} stage(s) each; {fix}"
    )
    return [Violation(("train.accumulate", "train.batch", "parallel.schedule", "parallel.pipeline"), message)]


def tied_ends_share_a_rank(config: TrainConfig) -> list[Violation]:
    """One weight serves the first stage and the last: both must be on one rank."""
    parallel = config.parallel
    if not config.model.tie_embeddings or parallel.pipeline == 1 or parallel.schedule == "dualpipev":
        return []
    message = (
        f"true needs the first and the last stage on one rank, which {parallel.schedule} on {parallel.pipeline} ranks "
        "does not give; use false, parallel.schedule: dualpipev, or parallel.pipeline: 1"
    )
    return [Violation(("model.tie_embeddings", "parallel.pipeline", "parallel.schedule"), message)]


LAYOUT_RULES = (
    experts_split_over_ranks,
    experts_split_over_storage,
    tensor_ranks_share,
    emulation_is_not_cut,
    lynx_plans_whole_layers,
    optimizer_steps_parts,
    shared_storage_runs_whole_backwards,
    layers_make_stages,
    micro_batches_fill_pipeline,
    tied_ends_share_a_rank,
    layout_is_consistent,
)
"""Hold for the configuration wherever it is read. `world_rules` hold for the ranks that were started."""


def multiples(number: int, step: int) -> str:
    """The positive multiples of `step` on both sides of `number`, in words."""
    low = number // step * step
    return f"{low} or {low + step}" if low else str(step)
