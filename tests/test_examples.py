"""What the documentation shows is what happens: tutorials block by block, examples in docstrings, generated pages, links."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from conftest import ROOT

import fastmmu
from fastmmu.__main__ import main
from fastmmu.strategy import EXPERIMENTS

DOCS = ROOT / "docs"
TUTORIALS = sorted(DOCS.glob("tutorial-*.md"))
BLOCK = re.compile(r"^```(pycon|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS


def run_python(block: str, names: dict[str, object], page: Path, line: int) -> None:
    """A pycon block, in the names of those before it."""
    test = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), line)
    told: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=told.append, clear_globs=False)
    assert results.attempted
    assert not results.failed, "".join(told)
    names.update(test.globs)


def run_console(block: str, page: Path, line: int, capsys: pytest.CaptureFixture) -> None:
    """A console block: command lines behind a dollar sign, each with what it prints."""
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        program, *arguments = shlex.split(command)
        assert program == "fastmmu", f"{page}:{line}: {command}"
        if arguments[0] == "races":  # takes the place of this process
            printed = subprocess.run(
                [sys.executable, "-m", "fastmmu", *arguments], capture_output=True, text=True, check=True
            ).stdout
        else:
            main(arguments)
            printed = capsys.readouterr().out
        assert doctest.OutputChecker().check_output(expected, printed, FLAGS), f"{page}:{line}: {command}\n{printed}"


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_says_what_happens(page: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        if block[1] == "pycon":
            run_python(block[2], names, page, line)
        else:
            run_console(block[2], page, line, capsys)


def test_there_are_three_tutorials() -> None:
    assert len(TUTORIALS) == 3


# --- docstrings


def shown() -> dict[str, object]:
    """The public functions and classes that somebody calls: not errors, enumerations, and what functions return."""
    names = {name: getattr(fastmmu, name) for name in fastmmu.__all__}
    return {
        name: value
        for name, value in names.items()
        if callable(value) and not (isinstance(value, type) and issubclass(value, (Exception, Enum, tuple))) and name != "Snapshot"
    }


@pytest.mark.parametrize("name", shown())
def test_the_example_in_a_docstring_is_what_happens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every public function and class has one, which needs nothing but its imports."""
    monkeypatch.chdir(ROOT)
    value = shown()[name]
    text = inspect.getdoc(value) or ""
    assert "Example" in text, name
    assert ">>> " in text, name
    run_python(text, {}, Path(inspect.getsourcefile(value) or name), 0)  # type: ignore[arg-type]


# --- pages


def test_the_bit_layouts_are_those_of_the_code() -> None:
    generated = runpy.run_path(str(DOCS / "generate.py"))["page"]()
    assert (DOCS / "bit-layouts.md").read_text() == generated, "stale: python docs/generate.py"
    for name in ("GPTE64", "PFERR", "ROLE", "EPT_SPTE", "CR4"):
        assert f"## {name}\n" in generated
    assert "| PSE36 | 16:13 | 0x1e000 | bits 35:32 of a 4 MiB page's address |" in generated
    assert "| SAVED | 56, 54 | 0x140000000000000 |" in generated


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target, section in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        goal = (page.parent / target) if target else page
        assert goal.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE) if section else []
        assert not section or section in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, section


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and page.name not in index]


def test_the_five_experiments_have_a_page_that_leads_to_them() -> None:
    page = (DOCS / "experiments.md").read_text()
    for name in ("access-checks", "mmio-cache", "fast-page-fault", "ept-qualification", "cached-access"):
        assert f"## {name}\n" in page
    for experiment in EXPERIMENTS:
        if f"## {experiment.name}\n" in page:
            section = page.split(f"## {experiment.name}\n")[1].split("\n## ")[0]
            assert not [one.name for one in experiment.strategies if f"`{one.name}`" not in section]
