"""The startup experiment: what does a user wait for before the first answer? Imports and a command, against the import of Numba.

Each run is a process of its own, from its start to its end, as a user meets it; bytecode and kernels are in their caches.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Description, Experiment, Over, Timed, unavailable
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, ratio_text, round_values

NAME, WORKLOAD = "startup", "process"
SNAPSHOT = Path(__file__).parent / "traces" / "snapshot-linux-boot.npz"
PLAIN = "numba"
OVER = Over(PLAIN, cost=True, called="the import of Numba")
CODE = {
    "interpreter": "",
    PLAIN: "import numba",
    "fastmmu": "import fastmmu",
    "everything": "from fastmmu import *",
    "translate-many": "import fastmmu as f; f.translate_many(f.GuestMemory(4096), f.Cpu(cr0=1, cr3=0, cr4=0, efer=0), [0])",
    "command-translate": f"from fastmmu.__main__ import main; main(['translate', {str(SNAPSHOT)!r}, 'ffffffff81000000'])",
    "command-map": f"from fastmmu.__main__ import main; main(['map', {str(SNAPSHOT)!r}])",
}
"""What each process runs."""
TIMEOUT = 120


def output_of(strategy: str) -> list[str]:
    """Lines that a process prints; the last is how many modules it has imported.

    Raises:
        CheckError: it fails.
    """
    command = [sys.executable, "-c", f"{CODE[strategy]}\nimport sys; print(len(sys.modules))"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=TIMEOUT)
    if run.returncode:
        raise CheckError(f"{NAME}/{WORKLOAD}/{strategy}: {(run.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return run.stdout.splitlines()


def digest_of(lines: list[str]) -> int:
    """Digest of what a process printed."""
    return int.from_bytes(hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest(), "little")


def cells(context: Context) -> list[Cell]:
    """One for each thing to wait for."""
    return [Cell(NAME, WORKLOAD, strategy) for strategy in CODE]


def check(context: Context, cell: Cell) -> Checked:
    """Every later run must print what the second one does; the first may have to compile, which imports more."""
    output_of(cell.strategy)
    lines = output_of(cell.strategy)
    modules = int(lines[-1])
    return Checked({"modules": modules, "lines": len(lines) - 1}, digest_of(lines), counts={"modules": modules})


def timed(context: Context, cell: Cell) -> Timed:
    """A process from its start to its end."""
    printed: list[list[str]] = []
    return Timed(lambda: printed.append(output_of(cell.strategy)), printed.clear, lambda: digest_of(printed[-1]), 1)


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """One table: the ratio over the import of Numba, formed within each round."""
    rows, rounds = [], 0
    for strategies in by_workload(suite).values():
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}
        if PLAIN not in times:
            continue
        rounds = len(times[PLAIN])
        for strategy, own in times.items():
            milliseconds = f"{sorted(own)[len(own) // 2] * 1e3:.0f}"
            ratio = ratio_text(times[PLAIN], own, cost=True)
            rows.append((strategy, ratio, milliseconds, *counts(counters_of(strategies[strategy]["time"]), "modules")))
    if not rows:
        return []
    note = (
        "Whole processes, bytecode and kernels cached. fastmmu: `import fastmmu`, which imports a name when it is first used; "
        f"everything: all of them at once; translate-many: the import and a first translation. {rounds} rounds."
    )
    return [Table("startup", ("process", OVER.head, "ms", "modules"), rows, note)]


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    description=Description("What does a user wait for before the first answer?"),
    over=OVER,
)
