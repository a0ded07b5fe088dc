"""The floors of the house: imports go down only, and what needs no torch loads without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("kernels", "parallel", "moe", "launch", "tools")
"""From the ground up: each may import itself and what stands before it."""

SOURCES = sorted(path for floor in (*FLOORS, "configs") for path in (ROOT / floor).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

TORCH_FREE = [
    "parallel.config",
    "parallel.events",
    "moe.config",
    "moe.config_size",
    "launch.config",
    "launch.engines.deepspeed_json",
    "launch.errors",
    "launch.exits",
    "launch.overrides",
    "launch.rules",
    "launch.settings",
    "launch.strict_yaml",
    "launch.typed",
    "launch.units",
    "tools.cli",
    "tools.config",
]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in the file, wherever it stands; relative ones resolved."""
    package = ("wastenot", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import moe` imports modules by their names.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_every_floor_has_files() -> None:
    for floor in FLOORS:
        assert any(name.startswith(f"{floor}/") for name in NAMES), floor


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_go_down_only(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    allowed = FLOORS[: FLOORS.index(floor) + 1] if floor in FLOORS else ()
    climbing = [
        (line, module)
        for line, module in imported(path)
        if module.split(".")[0] == "wastenot" and module.split(".")[1:2] and module.split(".")[1] not in allowed
    ]
    assert not climbing, f"{path.relative_to(ROOT)} reaches above its floor: {climbing}"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_floors_are_imported_under_their_full_name(path: Path) -> None:
    """`import moe` would find whatever else is called so."""
    bare = [(line, module) for line, module in imported(path) if module.split(".")[0] in (*FLOORS, "configs")]
    assert not bare


KERNELS = [path for path in SOURCES if path.is_relative_to(ROOT / "kernels")]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_import_only_torch_and_triton(path: Path) -> None:
    allowed = {"wastenot", "torch", "triton"} | set(sys.stdlib_module_names)
    assert {module.split(".")[0] for _, module in imported(path)} <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("floor", [*FLOORS[1:], "configs"])
def test_first_level_packages_hold_a_docstring_only(floor: str) -> None:
    """Importing one method never imports another."""
    body = ast.parse((ROOT / floor / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


def test_kernels_is_no_package_of_its_own() -> None:
    """In a checkout it would shadow the registry's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_model_is_built_without_the_compiler_and_without_triton() -> None:
    """Both take seconds to import; the second also decides, when it is imported, whether kernels are interpreted."""
    code = (
        "import sys\n"
        "import wastenot.launch.trainer, wastenot.launch.engines.native, wastenot.moe.mixture\n"
        "assert not {'triton', 'torch._dynamo'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_configurations_load_without_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module('wastenot.' + name)\n"
        "    assert 'torch' not in sys.modules, name\n"
        "    assert 'numpy' not in sys.modules, name\n"
        "from wastenot.launch.settings import load_config\n"
        "load_config('models/mixtral-8x7b')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RECTIFY = (
    "moe/rectify.py",
    "moe/adapters/huggingface_rectify.py",
    "moe/adapters/megatron.py",
    "moe/adapters/routings.py",
)
"""The method alone; benchmarks and documentation about it aside."""


def test_a_model_trains_where_rectification_is_deleted() -> None:
    """The method is separable: neither the model nor the trainer imports it until a configuration asks for it."""
    modules = [f"wastenot.{name.removesuffix('.py').replace('/', '.')}" for name in RECTIFY]
    assert all((ROOT / name).is_file() for name in RECTIFY)
    program = f"""
import sys
sys.modules.update(dict.fromkeys({modules!r}))  # importing one of them now fails
import torch
import wastenot.launch.trainer, wastenot.launch.engines.native
from wastenot.moe.config import ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.mesh import single

config = ModelConfig(vocab_size=64, d_model=32, layers=1, heads=2, moe=MoEConfig(experts=4, d_expert=16))
model = build_decoder(config, RouterConfig(capacity_factor=1.0), single())
tokens = torch.randint(0, 64, (2, 9))
model.loss_sum(model(tokens[:, :-1]).hidden_BSD, tokens[:, 1:].contiguous()).backward()
try:
    build_decoder(config, RouterConfig(capacity_factor=1.0, rectify=RectifyConfig(intra=True)), single())
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rectify" in done.stdout


def test_a_run_trains_is_evaluated_and_saved_where_compression_is_deleted() -> None:
    """The method is separable: what trains, opens and evaluates runs imports it for runs that it made alone."""
    assert (ROOT / "moe/compress/plan.py").is_file()
    program = """
import sys
sys.modules["wastenot.moe.compress"] = None  # importing it, or a part of it, now fails
import wastenot.launch.trainer, wastenot.launch.engines.native, wastenot.launch.evaluate
import wastenot.launch.saved_run, wastenot.moe.generate
import wastenot.tools.convert, wastenot.tools.report.command
try:
    import wastenot.launch.streamed
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_plans_and_places_are_read_without_torch() -> None:
    program = """
import sys
sys.modules["torch"] = None
import wastenot.moe.compress.plan, wastenot.moe.compress.places, wastenot.moe.compress.shapes
import wastenot.moe.compress.fingerprint, wastenot.moe.compress.families, wastenot.moe.compress.compose
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
