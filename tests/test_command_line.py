"""The command line itself: help that needs no docs, names that are imported when first used, and ends without a traceback."""

from __future__ import annotations

import argparse
import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import fastmmu
from fastmmu import interrupts
from fastmmu.__main__ import main
from fastmmu.command_line import make_parser

SNAPSHOT = ROOT / "bench" / "traces" / "snapshot-linux-boot.npz"
COMMAND = [sys.executable, "-m", "fastmmu"]
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def subcommands(parser: argparse.ArgumentParser | None = None, path: tuple[str, ...] = ()) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the subcommands, by name; those of a group by both names."""
    parser = parser or make_parser()
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return {" ".join(path): parser}
    return {name: one for word, inner in groups[0].choices.items() for name, one in subcommands(inner, (*path, word)).items()}


@pytest.mark.parametrize("name", subcommands())
def test_help_needs_no_docs(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*name.split(), "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    described, exits = text.split("exit status:\n")
    assert "examples:\n" in described and f"  fastmmu {name}" in described
    statuses = [int(line.split()[0]) for line in exits.splitlines()]
    assert {0, 2, 130} <= set(statuses) and statuses == sorted(statuses)
    parser = subcommands()[name]
    assert parser.description.split(".")[0][0].isupper()
    for action in parser._actions:
        assert action.help, f"{name} {action.dest}"


@pytest.mark.parametrize("name", subcommands())
def test_examples_of_the_help_are_command_lines(name: str) -> None:
    lines = [line.split("#")[0].split() for line in subcommands()[name].epilog.splitlines() if line.startswith("  fastmmu ")]
    assert lines
    for _, *arguments in lines:
        assert arguments[: name.count(" ") + 1] == name.split()
        assert make_parser().parse_args(arguments).run


@pytest.mark.parametrize("name", subcommands())
def test_the_docs_mention_every_command(name: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"fastmmu {name}" in page.read_text() for page in pages)
    assert f"`fastmmu {name}`" in (ROOT / "docs" / "README.md").read_text()


def test_every_public_name_is_told_to_type_checkers_too() -> None:
    tree = ast.parse((ROOT / "fastmmu" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {(node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == {(f"fastmmu.{module}", name) for module, names in fastmmu.MODULES.items() for name in names}
    assert sorted(fastmmu.__all__) == sorted(name for _, name in told)
    assert set(fastmmu.__all__) <= set(dir(fastmmu))
    for name in fastmmu.__all__:
        assert getattr(fastmmu, name).__class__.__name__ != "module", name
    with pytest.raises(AttributeError, match="module 'fastmmu' has no attribute 'nonsense'"):
        fastmmu.nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    """And a submodule of a function's name does not take its place."""
    code = (
        "import sys, fastmmu; assert not {'numpy', 'numba', 'rich'} & set(sys.modules);"
        "import fastmmu.translate, fastmmu.audit, fastmmu.explain, fastmmu.translate_nested;"
        "assert all(callable(getattr(fastmmu, name)) for name in ('translate', 'audit', 'explain', 'translate_nested'));"
        "assert 'fastmmu.machine' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- ends


@pytest.mark.parametrize("arguments", [("map", SNAPSHOT), ("explain", SNAPSHOT, "400000")], ids=lambda a: a[0])
def test_a_reader_that_goes_away(arguments: tuple) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [*COMMAND, *map(str, arguments)], stdout=writing, stderr=subprocess.PIPE, env=BUFFERED, check=False, timeout=60
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, b"")


def test_a_full_disk_and_no_output_at_all() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([*COMMAND, "map", str(SNAPSHOT)], stdout=full, stderr=subprocess.PIPE, env=BUFFERED, check=False)
    assert (run.returncode, run.stderr) == (2, b"error: output: No space left on device\n")
    closed = 'exec "$0" -m fastmmu explain "$1" 400000 --user >&- 2>&-'
    assert subprocess.run(["sh", "-c", closed, sys.executable, str(SNAPSHOT)], check=False, timeout=60).returncode == 0


def test_the_benchmark_without_an_output() -> None:
    for closed, status in (('exec "$0" -m bench --list >&-', 0), ('exec "$0" -m bench --only nonsense >&- 2>&-', 2)):
        run = subprocess.run(["sh", "-c", closed, sys.executable], cwd=ROOT, stderr=subprocess.PIPE, check=False, timeout=60)
        assert (run.returncode, run.stderr) == (status, b"")


def test_ctrl_c_while_threads_take_turns() -> None:
    command = [*COMMAND, "races"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()  # it is at work
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")


def test_ctrl_c_while_it_imports() -> None:
    code = (
        "import os, signal, sys\n"
        "class Now:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'numba': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Now())\n"
        "from fastmmu.__main__ import main\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "map", str(SNAPSHOT)]
    run = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"interrupted\n")


def test_ctrl_c_in_the_compiler_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(interrupts.os, "_exit", ends.append)
    before = signal.getsignal(signal.SIGINT)
    with interrupts.interruptible(whole_process=False):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not ends
        compiler = {"__name__": "llvmlite.binding.ffi", "signal": signal}
        with pytest.raises(KeyboardInterrupt):  # os._exit, which does not return, does here
            exec("signal.raise_signal(signal.SIGINT)", compiler)
    assert ends == [130]
    assert signal.getsignal(signal.SIGINT) is before
