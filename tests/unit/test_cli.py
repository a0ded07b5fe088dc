"""`wastenot`: help, exit codes, and what reaches stdout and stderr."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wastenot.launch.errors import UserError
from wastenot.launch.exits import guarded
from wastenot.tools import cli
from wastenot.tools.cli import COMMANDS, main

PRESENT = [name for name, module in COMMANDS.items() if importlib.util.find_spec(module)]

# A command that ends in every way a command can end.
ODD_COMMAND = """
import sys, time
from pathlib import Path
from wastenot.launch.errors import UserError

HELP = "end in an odd way"
EXAMPLE = "wastenot odd crash"

def add_arguments(parser):
    parser.add_argument("how")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dir")

def run(args):
    args.run_dir = args.dir
    if args.how == "crash":
        raise RuntimeError("the disk caught fire\\nand more")
    if args.how == "user":
        raise UserError("no such corpus: hamlet; nearest: shakespeare")
    if args.how == "hang":
        print("ready", flush=True)
        time.sleep(60)
    if args.how == "flood":
        for _ in range(100_000):
            print("line")
    return int(args.how) if args.how.isdigit() else 0
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "odd_command.py").write_text(ODD_COMMAND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "odd", "odd_command")
    # Logs of crashes among temporary files stay in the test's own folder.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def odd_process(folder: Path, how: str) -> subprocess.Popen[str]:
    code = f"import sys; from wastenot.tools import cli; cli.COMMANDS['odd'] = 'odd_command'; sys.exit(cli.main(['odd', {how!r}]))"  # fmt: skip # noqa: E501
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == PRESENT
    assert all(len(line) <= 110 for line in out.splitlines())


@pytest.mark.parametrize("name", PRESENT)
def test_each_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"usage: wastenot {name}")
    assert f"example:\n  wastenot {name}" in out


def test_no_command_shows_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: wastenot")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("wastenot 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["confg"], "'confg' is not a command; did you mean config?"),
        (["--quick"], "'--quick' is not a command; use one of "),
        (["config"], "the following arguments are required: CONFIG; see `wastenot config --help`"),
        (["config", "x", "--nope"], "unrecognized arguments: --nope; see `wastenot config --help`"),
        (["config", "x", "-s"], "argument -s/--set: expected one argument; see `wastenot config --help`"),
    ],
)
def test_bad_arguments_are_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_errors_are_json_on_stdout_where_json_was_asked_for(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "no such corpus: hamlet; nearest: shakespeare"
    assert main(["odd", "user", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": message}
    assert err == f"error: {message}\n"
    assert main(["odd", "--json", "--nope"]) == 2
    assert "required: how" in json.loads(capsys.readouterr().out)["error"]


def test_the_code_of_a_command_is_the_code_of_the_process(odd: Path) -> None:
    assert [main(["odd", how]) for how in ("0", "1", "2", "7")] == [0, 1, 2, 7]


def test_a_crash_is_one_line_and_a_log(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["odd", "crash"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    start = "error: RuntimeError: the disk caught fire (details in "
    assert err.startswith(start)
    assert err.count("\n") == 1
    log = Path(err.removeprefix(start).removesuffix(")\n"))
    assert log.parent == odd
    assert "Traceback" in log.read_text()
    assert "and more" in log.read_text()


def test_the_log_of_a_crash_goes_into_the_run(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["odd", "crash", "--json", "--dir", str(odd / "runs" / "one")]) == 1
    (log,) = (odd / "runs" / "one").iterdir()
    assert str(log) in json.loads(capsys.readouterr().out)["error"]
    # Where the run's folder cannot be written, the log still exists.
    (odd / "file").write_text("")
    assert main(["odd", "crash", "--dir", str(odd / "file")]) == 1
    assert "Traceback" in next(odd.glob("wastenot-*.log")).read_text()


def test_ctrl_c_ends_quietly_with_130(odd: Path) -> None:
    with odd_process(odd, "hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_reader_that_leaves_early_is_no_error_message(odd: Path) -> None:
    with odd_process(odd, "flood") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_guarded_passes_the_result_on_and_turns_user_errors_into_two() -> None:
    def bad() -> int:
        raise UserError("bad")

    assert guarded(lambda: 5) == 5
    assert guarded(bad) == 2


def test_config_prints_what_it_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("train: {steps: 1k}\nschedule: {warmup_steps: 10}")
    assert main(["config", str(tmp_path / "run.yaml"), "-s", "model.layers=2"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert main(["config", str(tmp_path / "resolved.yaml"), "--json"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["train"]["steps"], resolved["model"]["layers"]) == (1000, 2)


def test_config_check_tells_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "models/mixtral-8x7b", "--check"]) == 0
    assert capsys.readouterr().out == "models/mixtral-8x7b: legal; 46,702.8 M parameters, 12,879.9 M used per token\n"
    assert main(["config", "models/mixtral-8x7b", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["legal"] is True


def test_listing_commands_imports_none_of_them() -> None:
    code = "import sys; from wastenot.tools.cli import main; main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    assert cli.overview() in out
