"""The DeepSpeed JSON that a configuration asks for. Torch-free.

It follows from the YAML; entries of the user's own file (`deepspeed.json`) go over it, but for those that the YAML
decides: they may be left out, say the same, or say "auto".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import UserError

_DECIDED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.batch",
    "gradient_accumulation_steps": "train.accumulate",
    "zero_optimization.stage": "deepspeed.zero",
    "zero_optimization.reduce_scatter": "parallel.expert",
    "zero_optimization.contiguous_gradients": "parallel.expert",
    "gradient_clipping": "optimizer.clip_norm",
    "fp16.enabled": "train.precision",
    "bf16.enabled": "train.precision",
    "torch_autocast.enabled": "train.precision",
}
"""Entries that must say what the YAML says, and where that says it."""

_OTHERS = {
    "optimizer": "the optimizer is that of optimizer.name",
    "scheduler": "the learning rate is that of schedule",
    "gradient_allreduce_op": "gradients are summed",
    "gradient_predivide_factor": "gradients are summed",
    "prescale_gradients": "gradients are summed",
    "communication_data_type": "gradients travel in fp32",
    "data_types": "gradients are summed in fp32",
    "tensor_parallel": "no weight is cut",
    "sequence_parallel_size": "no sequence is cut",
    "use_data_before_expert_parallelism": "experts are over neighbouring ranks",
    "load_universal_checkpoint": "a run goes on from its own checkpoints",
    "amp.enabled": "precision is that of train.precision",
    "elasticity.enabled": "the batch is that of train.batch",
    "checkpoint.writer": "a checkpoint is published when its files are written",
    "nebula.enabled": "a checkpoint is published when its files are written",
    "datastates_ckpt": "a checkpoint is published when its files are written",
    "zero_optimization.offload_optimizer": "gradients are clipped where they are",
    "zero_optimization.offload_param": "gradients are clipped where they are",
    "zero_optimization.cpu_offload": "gradients are clipped where they are",
    "zero_optimization.cpu_offload_param": "gradients are clipped where they are",
    "zero_optimization.mics_shard_size": "weights are shared by all ranks",
    "zero_optimization.zero_hpz_partition_size": "weights are shared by all ranks",
}
"""Entries that must not be there (but as null, false or "auto"), and why."""

_ANY_SIZE = ("reduce_bucket_size", "allgather_bucket_size")
"""Of `zero_optimization`: what may change on resuming, as `parallel.bucket_bytes` may."""


def generated(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """The JSON for a world of `ranks`. Clipping is ours (its 0 is none), and so is bf16: autocast over fp32 weights."""
    elements = max(1, config.parallel.bucket_bytes // 4)
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero,
        "reduce_scatter": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
    }
    if config.deepspeed.zero in (1, 2):
        # The norm is ours too.
        zero["compute_grad_norm"] = False
    return {
        "train_batch_size": config.train.batch,
        "train_micro_batch_size_per_gpu": config.train.batch // config.train.accumulate // ranks,
        "gradient_accumulation_steps": config.train.accumulate,
        "gradient_clipping": 0.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": zero,
    }


def merged(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """`generated` under the entries of the user's file; UserError where they contradict the YAML."""
    made = generated(config, ranks)
    if config.deepspeed.json is None:
        return made
    said = read(config.deepspeed.json)
    wrong = [*contradictions(said, made), *_sizes(said, made)]
    if wrong:
        raise UserError(f"deepspeed.json: {config.deepspeed.json}: {'; '.join(wrong)}")
    return _over(made, said)


def read(path: str) -> dict[str, Any]:
    """The object in the file `path`; UserError where there is none."""
    try:
        said = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.json: {path} cannot be read ({error}); give a DeepSpeed JSON, or null") from error
    if not isinstance(said, dict):
        raise UserError(f"deepspeed.json: {path} holds no JSON object; give a DeepSpeed JSON, or null")
    return said


def contradictions(said: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """What in `said` is not as the YAML has it, of what does not depend on the number of ranks."""
    found, ours = [], dict(_entries(made))
    for path, value in _entries(said):
        if path in _DECIDED and path != "train_micro_batch_size_per_gpu" and value not in ("auto", _at(made, path)):
            wanted = json.dumps(_at(made, path))
            found.append(f"{path}: {json.dumps(value)} is not {wanted}, which {_DECIDED[path]} decides; leave it out")
        elif value != "auto" and path in ours and isinstance(value, Mapping) != isinstance(ours[path], Mapping):
            wanted = "an object" if isinstance(ours[path], Mapping) else json.dumps(ours[path])
            found.append(f"{path}: {json.dumps(value)} cannot stand there; give {wanted}, or leave it out")
        if path in _OTHERS and value not in ("auto", None, False):
            found.append(f"{path}: {_OTHERS[path]}; leave it out")
    return found


def changed_sharing(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Which entries of `zero_optimization` differ, `name value, not value`, of those that may decide which part of
    a weight is where in a checkpoint."""
    names = [name for name in {**before, **here} if name not in _ANY_SIZE and before.get(name) != here.get(name)]
    return [
        f"zero_optimization.{name} {json.dumps(before.get(name))}, not {json.dumps(here.get(name))}" for name in names
    ]


def _sizes(said: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    name = "train_micro_batch_size_per_gpu"
    if said.get(name, "auto") in ("auto", made[name]):
        return []
    return [f"{name}: {said[name]} is not {made[name]}, which train.batch and the ranks decide; leave it out"]


def _entries(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry by its path, objects before what is in them."""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")


def _at(values: Mapping[str, Any], path: str) -> Any:
    value: Any = values
    for name in path.split("."):
        value = value[name]
    return value


def _over(made: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """`made` with the entries of `said`, objects entry by entry; "auto" leaves what is there."""
    result = dict(made)
    for key, value in said.items():
        if isinstance(value, Mapping):
            result[key] = _over(made.get(key, {}), value)
        elif value != "auto":
            result[key] = value
    return result
