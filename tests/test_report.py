"""report.html and the figures: made from stored files, the same bytes each time, complete, and in need of nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pyperf
import pytest
from conftest import ROOT

from bench import page as page_module
from bench.charts import Bars, Lines
from bench.costs import projected, projection
from bench.experiment import Context, Experiment, Priced
from bench.lock_scaling import published
from bench.page import is_main
from bench.prices import COSTS, Prices
from bench.registry import EXPERIMENTS
from bench.report import FIGURES, PAGE, charts_in, committed_folders, figure_of, headline_folder, tables_of, write_report
from bench.results import ResultError, load_suite
from bench.tables import ratio_text, round_values
from bench.workloads import BUNDLED_TRACE

STORED = headline_folder(ROOT / "results")
VOID = {"meta", "link"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def copied(folder: Path, *names: str) -> Path:
    """Some stored files in a folder of their own."""
    folder.mkdir()
    for name in names or [path.stem for path in STORED.glob("*.json")]:
        shutil.copy(STORED / f"{name}.json", folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all stored files, and the report of them."""
    folder = copied(tmp_path_factory.mktemp("report") / "all")
    assert write_report(folder, Prices()) == ""
    return folder


class Outline(HTMLParser):
    """Tags that are opened and closed in order; ids, links, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href") and (value or "").startswith("#"):
                self.links.append((value or "")[1:])
            elif name in ("src", "href", "srcset", "data", "action") and value != "data:,":
                self.fetched.append(value or "")
            elif "url(#" in (value or ""):
                self.links += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_same_files_make_the_same_bytes(written: Path, tmp_path: Path) -> None:
    """In another process, whose hashes are seeded otherwise."""
    folder = copied(tmp_path / "again")
    told = {"PYTHONHASHSEED": "77", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "bench", "--report", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False, timeout=120)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    ours, theirs = ({path.relative_to(one): path.read_bytes() for path in one.rglob("*.*")} for one in (written, folder))
    assert ours == theirs
    assert len(list((folder / FIGURES).iterdir())) > 10 and not list(folder.rglob("*.tmp"))


def test_the_page_is_whole_and_fetches_nothing(written: Path) -> None:
    text = (written / PAGE).read_text()
    outline = Outline()
    outline.feed(text)
    assert not outline.open and not outline.fetched
    assert len(outline.ids) == len(set(outline.ids)), "an id twice"
    assert set(outline.links) <= set(outline.ids)
    assert outline.counts["table"] == outline.counts["caption"]
    assert outline.counts["svg"] == outline.counts["desc"] == len(list((written / FIGURES).iterdir()))
    assert "<script" not in text and "@import" not in text
    for folder_name in ("/tmp", str(ROOT)):
        assert folder_name not in text


def test_each_question_has_its_section(written: Path) -> None:
    text = unescape((written / PAGE).read_text())
    main = [one for one in EXPERIMENTS.values() if is_main(one)]
    assert {"access-checks", "mmio-cache", "fast-page-fault", "ept-qualification"} <= {one.name for one in main}
    for one in main:
        said = one.description
        assert said is not None and all((said.question, said.claim, said.source, said.not_shown, said.year)), one.name
        assert all(part in text for part in (said.question, said.claim, said.source, said.not_shown)), one.name
        stored = (written / f"{one.name}.json").exists()
        assert (f"--only {one.name}</code> makes them" in text) == (not stored)
    years = [int(year) for year in re.findall(r"<h2>[\w-]+ \((\d+)\)</h2>", text)]
    assert years == sorted(years) and len(years) == len(main)


def test_every_stored_table_is_on_the_page(written: Path) -> None:
    text = unescape((written / PAGE).read_text())
    for table in tables_of(written):
        assert f">{table.title}</caption>" in text
        for first, *cells in table.rows:
            assert f'<th scope="row">{first}</th>' in text
            assert all(f">{cell}</td>" in text for cell in cells)


def test_charts_show_what_the_tables_say() -> None:
    charts = charts_in(STORED)
    (bars,) = charts["mmio-cache"]
    suite = load_suite(STORED / "mmio-cache.json")
    assert isinstance(bars, Bars)
    for bar in bars.bars:
        times = [round_values(suite[f"mmio-cache/linux-boot/{name}/time"]) for name in ("none", bar.label)]
        assert bar.said == ratio_text(*times, cost=False)
        assert bar.low is not None and bar.high is not None and bar.low <= bar.value <= bar.high
    assert [bar.label for bar in bars.bars] == ["gva-only", "gva+cr3", "generation"]
    unstable = [bar for chart in charts["faults"] if isinstance(chart, Bars) for bar in chart.bars if bar.unstable]
    assert unstable and all(bar.said.startswith("unstable") for bar in unstable)


def test_published_points_stand_beside_ours() -> None:
    (lines,) = charts_in(STORED)["lock-scaling"]
    assert isinstance(lines, Lines)
    rows = {(row.series, row.vcpus): row.seconds for row in published()}
    for panel in lines.panels:
        points = {one.source: dict(one.points) for one in panel.series}
        for vcpus, seconds in points["published"].items():
            assert seconds == pytest.approx(rows[panel.title, int(vcpus)], abs=1e-6)
        assert set(points["published"]) < set(points["simulated"])
    resume = next(chart for chart in charts_in(STORED)["fast-page-fault"] if isinstance(chart, Lines))
    assert [round(value, 2) for value, _ in resume.levels] == [1.90, 2.15]  # facts 11.2
    assert all([x for x, _ in one.points] == [1, 2, 4] for one in resume.panels[0].series)


def test_stored_figures_are_those_of_the_stored_files() -> None:
    """By their words, which other versions of the plotting library leave as they are."""
    wanted = {figure_of(STORED, chart): chart for charts in charts_in(STORED).values() for chart in charts}
    assert set((STORED / FIGURES).iterdir()) == set(wanted), "python -c 'from bench.report import regenerate' makes them"
    for path, chart in wanted.items():
        root = ElementTree.parse(path).getroot()
        assert root.findtext("{http://www.w3.org/2000/svg}desc") == chart.words, path
    readme = (ROOT / "README.md").read_text()
    assert f"(results/{STORED.name}/{FIGURES}/mmio-cache.svg)" in readme


def test_without_the_plotting_library_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = copied(tmp_path / "some", "mmio-cache")
    (folder / FIGURES).mkdir()
    (folder / FIGURES / "mmio-cache.svg").write_text("drawn elsewhere")
    missing = write_report(folder, Prices())
    assert missing.startswith("No charts: charts need matplotlib") and "\n" not in missing
    text = unescape((folder / PAGE).read_text())
    assert missing in text and "<svg" not in text and "3.00 [2.97, 3.01]" in text
    assert [path.read_text() for path in (folder / FIGURES).iterdir()] == ["drawn elsewhere"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tmp_path / "some", "mmio-cache", "replay")
    write_report(folder, Prices())
    (folder / FIGURES / "of-yesterday.svg").write_text("")
    write_report(folder, Prices())
    assert sorted(path.name for path in (folder / FIGURES).iterdir()) == ["mmio-cache.svg", "replay.svg"]
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    honest = Path.write_text

    def failing(self: Path, text: str, **options: str) -> int:
        if self.name.startswith(f".{PAGE}"):
            raise OSError(28, "No space left on device")
        return honest(self, text, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(ResultError, match="cannot be written: No space left"):
        write_report(folder, Prices(exit=7.0))
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    with pytest.raises(ResultError, match="no result files in it"):
        write_report(tmp_path / "nowhere", Prices())


def test_names_and_notes_are_text_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "TITLE", "<b>&")
    text = page_module.page([page_module.Part(EXPERIMENTS["replay"])], Prices(), "<i>")
    assert "<h1>&lt;b&gt;&amp;</h1>" in text and "<i>" not in text
    assert "without stored results: replay" in text and "Nothing was timed." in text


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_has_nothing_to_complain_of(written: Path, tmp_path: Path) -> None:
    def opened(path: Path) -> tuple[str, list[str]]:
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / path.stem}", "--dump-dom", path.as_uri(),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return run.stdout, [line for line in run.stderr.splitlines() if ":CONSOLE" in line]

    dom, complaints = opened(written / PAGE)
    assert not complaints
    assert dom.count("<svg") == len(list((written / FIGURES).iterdir())) and "The costs assumed" in dom
    broken = tmp_path / "broken.html"
    broken.write_text("<script>undefined.x</script>")
    assert opened(broken)[1], "errors of a page are seen"


def test_projections_are_counts_times_costs() -> None:
    priced = Priced("accesses", exits=("a", "b"), flushes=("c",), locks=("d",), endless=("e",))
    counters = {"accesses": 10, "a": 3, "b": 2, "c": 1, "d": 20, "e": 0}
    assert projected(priced, counters, Prices(exit=100, flush=1000, lock=10)) == pytest.approx(50 + 100 + 20)
    assert projected(priced, {**counters, "e": 1}, Prices()) is None, "no end to it"
    assert projected(priced, {**counters, "accesses": 0}, Prices()) is None
    assert projected(priced, {"accesses": 10}, Prices()) is None
    assert projected(None, counters, Prices()) is None


def test_projections_of_stored_files() -> None:
    one = EXPERIMENTS["access-checks"]
    suite = load_suite(STORED / "access-checks.json")
    (own,) = one.tables(suite)
    measured = {row[0]: row[1] for row in own.rows}

    def rows(prices: Prices) -> dict[str, tuple[str, ...]]:
        table = projection(one, suite, prices)
        assert table is not None and "projection" in table.title and "not a measurement" in table.note
        return {row[0]: row for row in table.rows}

    free, dear = rows(Prices(0, 0, 0)), rows(Prices(exit=1e6))
    for name in (name for name, ratio in measured.items() if ratio != "-"):
        assert free[name][1] == measured[name], "without costs the ratio is the measured one"
    assert dear["snapshot-linux-boot / once"][1] == f"{55_890 / 36_516:.2f} [{55_890 / 36_516:.2f}, {55_890 / 36_516:.2f}]"
    assert dear["matrix-wp1 / after-walk"][1:4] == ("-", "-", "no end")
    assert float(dear["snapshot-fork-exec / once"][2]) == pytest.approx(1e6 * 18_300 / 34_360, abs=1)
    assert all(cost.source and cost.paid_for for cost in COSTS)
    assert "as given" in Prices(exit=5).words[0] and "the default" in Prices().words[0]


@pytest.mark.parametrize("one", EXPERIMENTS.values(), ids=lambda one: one.name)
def test_what_an_experiment_says_of_itself_holds(one: Experiment) -> None:
    """Its plain strategies are cells, the counters it prices are in its stored files, its parameters have ranges."""
    cells = set(one.cells(Context(BUNDLED_TRACE, 1_000)))
    for cell in cells:
        over = one.over_of(cell)
        assert over is None or replace(cell, strategy=over.strategy) in cells
    assert one.part_of == "" or EXPERIMENTS[one.part_of].description
    assert all(parameter.meaning and parameter.least <= parameter.most for parameter in one.parameters)
    if one.priced is None:
        return
    named = {*one.priced.exits, *one.priced.flushes, *one.priced.locks, *one.priced.endless, one.priced.per}
    for folder in committed_folders(ROOT / "results"):
        path = folder / f"{one.name}.json"
        suite: dict[str, pyperf.Benchmark] = load_suite(path) if path.exists() else {}
        assert not suite or projection(one, suite, Prices()) is not None
        counters = {name for benchmark in suite.values() for name in benchmark.get_metadata()}
        assert not suite or {f"fastmmu_{name}" for name in named} <= counters
