"""What a planner is told of a model: from a run's configuration, or from one in Hugging Face's keys. Torch-free."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from ..launch.planner_input import PlannerInput, from_config
from ..launch.settings import parse_config
from ..launch.strict_yaml import parse_yaml
from ..parallel.lynx.huggingface import from_huggingface
from ..parallel.lynx.layout import Layout
from ..parallel.lynx.nearest import suggestion
from ..parallel.lynx.optimizer_state import Optimizer


def read_model(name: str) -> PlannerInput:
    """The model in the file `name` (a run's YAML, or a config.json or YAML in its keys), or the shipped one.

    Raises ValueError in one line (UserError: several, about a run's YAML) where there is none, or none that is known.
    """
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        text, called = path.read_text(encoding="utf-8"), path.stem if path.stem != "config" else path.parent.name
    else:
        known = shipped_models()
        called = path.as_posix().removesuffix(".yaml").rpartition("/")[2]
        if called not in known:
            raise ValueError(f"model: no file and no model is called {name!r}; {suggestion(called, known)}")
        text = known[called]
    given = json.loads(text) if path.suffix == ".json" else parse_yaml(text, name)
    if isinstance(given, dict) and "model_type" in given:
        return PlannerInput(shape=from_huggingface(given, called), layout=Layout(), optimizer=Optimizer())
    return from_config(parse_config(given, name), called)


def shipped_models() -> dict[str, str]:
    """YAML of the models that come with the package, by name."""
    folder = files("wastenot.configs").joinpath("models")
    entries = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in entries}
