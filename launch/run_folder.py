"""The folder of a run: what is in it, and whether a configuration may go on in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError
from .settings import as_mapping, dump_config, parse_config
from .strict_yaml import read_yaml

MAY_CHANGE = (
    "parallel",
    "checkpoint",
    "log",
    "kernels",
    "deepspeed.json",
    "megatron",
    "data.dir",
    "train.steps",
    "train.nproc",
    "train.eval_every",
    "train.eval_batch",
    "train.sample_tokens",
    "train.nonfinite_limit",
)
"""What a resumed run may say otherwise: none of it changes what a step computes (`steps` moves the schedule)."""


class RunFolder:
    """Names of the things that a run writes."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.summary = self.path / "summary.json"
        self.ledger = self.path / "ledger.json"
        self.picture = self.path / "report.png"
        self.profile = self.path / "profile"

    def load_config(self) -> TrainConfig:
        """The configuration the run was made with; UserError where this is no run."""
        if not self.config.is_file():
            raise UserError(f"{self.path} is not a run: it has no config.yaml; give the log.dir of a training run")
        # Not `settings.load_config`: that also asks whether this machine could train it, corpus and all.
        return parse_config(read_yaml(self.config), str(self.config))

    def has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))

    def check_may_continue(self, config: TrainConfig) -> None:
        """Raises UserError where the folder holds a run that `config` would not continue."""
        if not self.has_checkpoints():
            return
        if config.checkpoint.resume == "never":
            raise UserError(
                f"log.dir: {self.path} already holds a run; use another log.dir, or checkpoint.resume: auto"
            )
        if config.checkpoint.resume == "auto" and self.config.is_file():
            before, after = as_mapping(self.load_config()), as_mapping(config)
            if config.model.vocab_size == 0:
                # The run has written down what the tokenizer said.
                after["model"]["vocab_size"] = before["model"]["vocab_size"]
            changed = differences(before, after)
            if changed:
                raise UserError(
                    f"log.dir: {self.path} holds a run of another configuration ({'; '.join(changed)}); "
                    "use another log.dir, or the run's own values"
                )

    def prepare(self, config: TrainConfig, tokenizer_files: list[Path]) -> None:
        """Creates the folder with the resolved configuration and the tokenizer."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, dump_config(config))
        self.tokenizer.mkdir(exist_ok=True)
        for file in tokenizer_files:
            shutil.copyfile(file, self.tokenizer / file.name)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`path: old -> new` for every value that differs and may not (`MAY_CHANGE`)."""
    found = []
    for key in {**before, **after}:
        path = f"{prefix}{key}"
        old, new = before.get(key), after.get(key)
        if path in MAY_CHANGE or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{path}.")
        else:
            found.append(f"{path}: {json.dumps(old)} -> {json.dumps(new)}")
    return found


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` in one step: a reader sees the old text or the new one, whatever happens."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
