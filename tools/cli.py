"""`wastenot …`: one entry to every command. A command's module is imported only when that command runs.

A command is a module with `HELP` (one line), `EXAMPLE` (one command a line), `add_arguments(parser)` and
`run(args)`, which returns an exit code. A `run` that sets `args.run_dir` has the logs of its crashes put there.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from ..launch.errors import UserError
from ..launch.exits import BAD_INPUT, OK, guarded

COMMANDS = {
    "train": "wastenot.launch.train",
    "data": "wastenot.tools.data",
    "config": "wastenot.tools.config",
    "eval": "wastenot.tools.eval",
    "report": "wastenot.tools.report.command",
    "slots": "wastenot.tools.slots",
    "generate": "wastenot.tools.generate",
    "convert": "wastenot.tools.convert",
    "upcycle": "wastenot.tools.upcycle",
    "launch": "wastenot.tools.launch",
    "simulate": "wastenot.tools.simulate",
    "plan": "wastenot.tools.plan",
    "profile": "wastenot.tools.profile_machine.command",
    "compress": "wastenot.tools.compress.command",
    "doctor": "wastenot.tools.doctor",
    "bench": "wastenot.tools.bench.command",
}
"""Names and modules, in the order of `wastenot --help`. A folder that is deleted takes its commands along."""


class Parser(argparse.ArgumentParser):
    """Reports bad arguments as UserError, as all other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: this process's); returns 0, 2 (bad input), 1 (our fault) or 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(run_dir=None)

    def work() -> int:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview(), file=sys.stdout if arguments else sys.stderr)
            return OK if arguments else BAD_INPUT
        if arguments[0] in ("-V", "--version"):
            print(f"wastenot {version('wastenot')}")
            return OK
        command = importlib.import_module(_module_of(arguments[0]))
        parser = make_parser(arguments[0], command.HELP, command.EXAMPLE)
        command.add_arguments(parser)
        try:
            parser.parse_args(arguments[1:], namespace=args)
        except SystemExit as end:
            # argparse has printed the help.
            return end.code if isinstance(end.code, int) else OK
        return command.run(args)

    def run_dir() -> Path | None:
        return None if args.run_dir is None else Path(args.run_dir)

    return guarded(work, as_json="--json" in arguments, run_dir=run_dir)


def make_parser(name: str, summary: str, example: str) -> Parser:
    """The parser of command `name`, still without its own arguments."""
    return Parser(
        prog=f"wastenot {name}",
        description=summary[:1].upper() + summary[1:].removesuffix(".") + ".",
        epilog="example:\n" + "\n".join(f"  {line.strip()}" for line in example.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def overview() -> str:
    """The text of `wastenot --help`."""
    present = {name: module for name, module in COMMANDS.items() if importlib.util.find_spec(module)}
    width = max(map(len, present))
    lines = [f"  {name:<{width}}  {_constant(module, 'HELP')}" for name, module in present.items()]
    return "\n".join(
        [
            "usage: wastenot COMMAND ...",
            "",
            "Mixture-of-experts training that wastes nothing.",
            "",
            "commands:",
            *lines,
            "",
            "`wastenot COMMAND --help` says more about one. Exit codes: 0 done, 2 bad input, 1 our fault.",
        ]
    )


def _module_of(name: str) -> str:
    present = [command for command, module in COMMANDS.items() if importlib.util.find_spec(module)]
    if name in present:
        return COMMANDS[name]
    close = difflib.get_close_matches(name, present, n=1)
    hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(present)}"
    raise UserError(f"{name!r} is not a command; {hint}")


def _constant(module: str, name: str) -> str:
    """The text assigned to `name` in the source of `module`: listing commands must not import them (and torch)."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return str(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no {name}")


if __name__ == "__main__":
    sys.exit(main())
