"""report.html: one page that needs nothing else, made from result files and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

import pyperf

from bench.charts import Chart
from bench.experiment import Experiment
from bench.figures import DARK, GRID, INK, MUTED, SURFACE, style
from bench.prices import COSTS, Prices
from bench.tables import UNSTABLE, Table

MACHINE = {"cpu_model_name": "{}", "cpu_count": "{} CPUs", "python_version": "Python {}", "perf_version": "pyperf {}"}
TITLE = "fastmmu: what KVM's MMU gains by remembering"
LEAD = (
    "Each section is a question that a patch to KVM once raised, answered by an executable model of its MMU. Every result behind "
    "these numbers was compared with a reference before anything was timed. Ratios come first; the interval behind each is the "
    f"middle half of the rounds, and a ratio whose interval is wider than {UNSTABLE:.0%} of it is called unstable instead of given "
    "as a number."
)
LONG = 20  # rows: in front of a table that has more, its charts
RATIOS = ("speed-up", "cost", "rate", "ratio", "projected ratio")


@dataclass(frozen=True)
class Part:
    """One experiment of the page: its stored suite, if any, with its tables and projection, and its charts as SVG, if there are."""

    experiment: Experiment
    suite: dict[str, pyperf.Benchmark] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    what_if: Table | None = None
    charts: tuple[tuple[Chart, str], ...] = ()


def sheet() -> str:
    """The style sheet; colours of figures and page are the same."""
    light = f"--ink:{INK};--muted:{MUTED};--line:{GRID};--page:{SURFACE};--soft:#f4f6f8;--link:#005a8e"
    dark = f"--ink:{DARK[INK]};--muted:{DARK[MUTED]};--line:{DARK[GRID]};--page:{DARK[SURFACE]};--soft:#1f262f;--link:#7cc4f0"
    return f"""
:root{{{light};color-scheme:light dark}}
@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
header,main,footer,nav{{max-width:68rem;margin:0 auto;padding:0 1.25rem}}
header{{padding-top:2.5rem}}
h1{{font-size:1.9rem;line-height:1.2;margin:0 0 .75rem}}
h2{{font-size:1.4rem;line-height:1.25;margin:3.5rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--line)}}
h3{{font-size:1.1rem;margin:2.5rem 0 .5rem}}
h4{{font-size:.95rem;margin:1.5rem 0 .25rem}}
p{{margin:.5rem 0;max-width:46rem}}
a{{color:var(--link)}}
.question{{font-size:1.12rem}}
.muted,footer,figcaption,.note{{color:var(--muted);font-size:.875rem}}
.claim,.shown{{border-left:3px solid var(--line);padding-left:1rem;margin:1rem 0}}
nav ul{{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:0;margin:1.25rem 0 0}}
.wide{{overflow-x:auto;margin:1.25rem 0}}
.wide:focus-visible{{outline:2px solid var(--link);outline-offset:2px}}
table{{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;min-width:100%}}
caption{{text-align:left;font-weight:600;padding:.25rem 0 .5rem;font-size:.95rem}}
th,td{{text-align:right;padding:.3rem .75rem;border-bottom:1px solid var(--line);vertical-align:baseline}}
th:first-child,td:first-child{{text-align:left;padding-left:0}}
thead th{{font-weight:600;color:var(--muted);vertical-align:bottom;border-bottom:2px solid var(--line)}}
tbody th{{font-weight:400}}
td,tbody th{{white-space:nowrap}}
td.ratio{{font-weight:600}}
tbody tr:hover{{background:var(--soft)}}
figure{{margin:1.5rem 0}}
figure .wide{{margin:0}}
svg.chart{{display:block;min-width:34rem;width:100%;max-width:46rem;height:auto}}
figcaption{{margin-bottom:.5rem}}
code{{font-size:.92em}}
footer{{padding-top:2rem;padding-bottom:3rem}}
@media(max-width:40rem){{body{{font-size:15px}}h1{{font-size:1.5rem}}th,td{{padding:.3rem .5rem}}}}
@media print{{body{{font-size:10pt}}nav{{display:none}}.wide{{overflow:visible}}table{{font-size:7pt}}
h2,h3,h4,caption,figcaption{{break-after:avoid}}
figure,tr,.claim,.shown{{break-inside:avoid}}svg.chart{{min-width:0}}th,td{{padding:.15rem .3rem}}}}
{style()}
"""


def page(parts: Iterable[Part], prices: Prices, missing: str = "") -> str:
    """The whole page; `missing` says why it has no charts."""
    every = list(parts)
    main = sorted((part for part in every if is_main(part.experiment)), key=lambda part: part.experiment.description.year)  # type: ignore[union-attr]
    names = {part.experiment.name for part in main}
    below = {name: [part for part in every if part.experiment.part_of == name] for name in names}
    taken = names | {part.experiment.name for parts_of in below.values() for part in parts_of}
    others = [part for part in every if part.experiment.name not in taken]
    sections = [section(part, below[part.experiment.name]) for part in main]
    links = [(part.experiment.name, f"{part.experiment.name} ({part.experiment.description.year})") for part in main]  # type: ignore[union-attr]
    if stored := [part for part in others if part.suite]:
        body = "".join(article(part, "h3") for part in stored)
        sections.append(f'<section id="others"><h2>Other experiments</h2>{body}</section>')
        links.append(("others", "other experiments"))
    if unstored := [part.experiment.name for part in others if not part.suite]:
        sections.append(f'<p class="muted">Other experiments without stored results: {escape(", ".join(unstored))}.</p>')
    sections.append(costs(prices))
    menu = "".join(f'<li><a href="#{escape(target)}">{escape(text)}</a></li>' for target, text in links)
    warning = f"<p><strong>{escape(missing)}</strong></p>" if missing else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(TITLE)}</title>
<link rel="icon" href="data:,">
<style>{sheet()}</style>
</head>
<body>
<header><h1>{escape(TITLE)}</h1><p>{escape(LEAD)}</p>{warning}<p class="muted">{escape(machine(every))}</p></header>
<nav aria-label="Experiments"><ul>{menu}</ul></nav>
<main>
{chr(10).join(sections)}
</main>
<footer><p>Made by <code>python -m bench --report</code> from the result files beside it; not edited by hand.</p></footer>
</body>
</html>
"""


def is_main(experiment: Experiment) -> bool:
    """Whether it answers a question from the sources under its own heading."""
    return experiment.description is not None and bool(experiment.description.source) and not experiment.part_of


def machine(parts: list[Part]) -> str:
    """What the stored files say about the machine; each value that differs between them."""
    found: dict[str, list[str]] = {name: [] for name in MACHINE}
    rounds: list[int] = []
    for benchmark in (one for part in parts for one in part.suite.values() if one.get_unit() == "second"):
        metadata = benchmark.get_metadata()
        rounds.append(benchmark.get_nrun())
        for name, values in found.items():
            if name in metadata and str(metadata[name]) not in values:
                values.append(str(metadata[name]))
    if not rounds:
        return "Nothing was timed."
    said = [MACHINE[name].format(" or ".join(values)) for name, values in found.items() if values]
    spread = f"{min(rounds)} to {max(rounds)}" if min(rounds) != max(rounds) else f"{rounds[0]}"
    return f"Measured on {', '.join(said)}; {spread} interleaved rounds, one worker process for each cell and round."


def section(part: Part, below: list[Part]) -> str:
    """One of the questions from the sources, with the experiments that belong to it."""
    return f'<section id="{escape(part.experiment.name)}">{article(part, "h2")}' + "".join(
        article(one, "h3") for one in below
    ) + "</section>"  # fmt: skip


def article(part: Part, heading: str) -> str:
    """Question, claim, charts, tables, projection, and what all this does not show."""
    name, said = part.experiment.name, part.experiment.description
    year = f" ({said.year})" if said and said.year else ""
    out = [f"<{heading}>{escape(name + year)}</{heading}>"]
    if said:
        out.append(f'<p class="question">{escape(said.question)}</p>')
        source = f' <span class="muted">{escape(said.source)}.</span>' if said.source else ""
        if said.claim:
            out.append(f'<div class="claim"><p><strong>The claim.</strong> {escape(said.claim)}{source}</p></div>')
    if part.suite:
        shown = [table_html(table, f"{name}-table-{number}") for number, table in enumerate(part.tables, 1)]
        charts = [figure(chart, svg) for chart, svg in part.charts]
        first = 0 if part.tables and len(part.tables[0].rows) > LONG else 1
        out += [*shown[:first], *charts, *shown[first:]]
        if part.what_if is not None:
            out.append(table_html(part.what_if, f"{name}-projection"))
            out.append('<p class="note"><a href="#costs">The costs assumed</a></p>')
    else:
        out.append(f'<p class="muted">No results stored yet: <code>python -m bench --only {escape(name)}</code> makes them.</p>')
    if said and said.not_shown:
        out.append(f'<div class="shown"><p><strong>What this does not show.</strong> {escape(said.not_shown)}</p></div>')
    return "\n".join(out)


def figure(chart: Chart, svg: str) -> str:
    """A chart; who cannot see it has its words in it."""
    title = escape(chart.title)
    drawn = f'<div class="wide" tabindex="0" role="group" aria-label="{title}">{svg}</div>'
    return f"<figure><figcaption>{title}</figcaption>{drawn}</figure>"


def table_html(table: Table, name: str) -> str:
    """A table with caption and heads that name their cells; wide ones scroll by themselves."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    marks = [' class="ratio"' if title.startswith(RATIOS) else "" for title in table.head[1:]]
    rows = []
    for first, *cells in table.rows:
        values = "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, cells, strict=True))
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{values}</tr>')
    note = f'<p class="note">{prose(table.note)}</p>' if table.note else ""
    caption = f'<caption id="{escape(name)}">{escape(table.title)}</caption>'
    body = "\n".join((f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>", *rows, "</tbody></table>"))
    return f'<div class="wide" tabindex="0" role="region" aria-labelledby="{escape(name)}">{body}</div>{note}'


def prose(text: str) -> str:
    """Text of a note; what stands in backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def costs(prices: Prices) -> str:
    """What the projections assume."""
    said = "".join(f"<li>{escape(text)}</li>" for text in prices.words)
    intro = "The projections multiply exact counts by these. They are assumptions, not measurements: give your own"
    options = ", ".join(f"<code>--{cost.name}-cost NS</code>" for cost in COSTS)
    return f'<section id="costs"><h2>The costs assumed</h2><p>{intro} ({options}).</p><ul>{said}</ul></section>'
