"""`wastenot convert from-deepspeed`: a checkpoint that DeepSpeed wrote in a run of ours, as a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..launch.engine_config import DeepSpeedConfig
from ..launch.engines import deepspeed_checkpoints as checkpoints
from ..launch.errors import UserError
from ..launch.run_folder import RunFolder
from ..launch.saved_run import blank_decoder, write_run
from ..launch.settings import parse_config
from ..launch.tokenizer import load_tokenizer
from ..parallel.mesh import single


def from_deepspeed(source: Path, target: Path, step: int | None = None) -> dict[str, Any]:
    """Writes a checkpoint of the run `source`, which DeepSpeed trained, as a run with one checkpoint, of step 0.

    source: the run, or one of its checkpoints; `step` None: the newest. Raises UserError where there is none.
    """
    checkpoint = checkpoints.find(source, step)
    saved = checkpoints.read_meta(checkpoint)
    before = parse_config(saved["config"], str(checkpoint))
    config = replace(
        before,
        engine="native",
        deepspeed=DeepSpeedConfig(),
        checkpoint=replace(before.checkpoint, resume="auto"),
        log=replace(before.log, dir=str(target)),
    )
    model = blank_decoder(config, single("cpu"), config.router)
    try:
        checkpoints.refuse_missing(checkpoint, saved)
        model.load_state_dict(checkpoints.weights(checkpoint, saved["zero"]))
    except UserError:
        raise
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint} cannot be read: {checkpoints.one_line(error)}") from error
    tokenizer = load_tokenizer(RunFolder(checkpoint.resolve().parent.parent).tokenizer)
    write_run(config, model, tokenizer, str(checkpoint), saved["layout"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"target": str(target), "family": "from DeepSpeed", "parameters": parameters}
