"""Scenario files `kvm-truth/1`: what was done to a virtual machine, step by step, and what a real KVM then counted.

Everything in a file is checked when it is read: each step by the table below, each counter by its name. What stands in `info` is
extra and is not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastmmu.bits import CR0, PAGE_SIZE, PHYSICAL_LIMIT
from fastmmu.kvm import SPLIT_ACCESS
from fastmmu.machine_state import KVM_COUNTERS
from fastmmu.trace.npz import TraceError, first_line

FORMAT = "kvm-truth/1"
COUNTERS = frozenset(counter.name.lower() for counter in KVM_COUNTERS)
LARGEST_COUNT = 1 << 32
HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9a-fA-F]{1,16}")
LONGEST_SHOWN = 80  # characters of a value in a message
LONGEST_BITMAP = 1 << 24  # bytes: 512 GiB of pages
LONGEST_RUN = 1 << 26  # words
SMALLEST_LIMIT = 64
LONGEST_LOOPS = 1 << 22  # iterations in a file
TABLE_AREAS = ((0x100000, 0x600000), (0x600000, 0x6F0000))  # guest page tables, nested tables


@dataclass(frozen=True)
class Scenario:
    """One scenario: numbers are ints, whatever the file writes them as; steps are dicts with the fields of the format."""

    name: str
    source: str  # the path, for messages
    config: dict[str, Any]
    cpu: dict[str, Any]
    interpreter: dict[str, int]
    memory: list[dict[str, int]]
    steps: list[dict[str, Any]]


class Wrong(Exception):
    """A value that is not what the format says: (where, what, expected)."""

    def __init__(self, where: str, what: object, expected: str) -> None:
        shown = repr(what) if len(repr(what)) <= LONGEST_SHOWN else repr(what)[:LONGEST_SHOWN] + "…"
        super().__init__(f"{where}: {shown}, expected {expected}" if where else f"{shown}, expected {expected}")


Convert = Callable[[Any, str], Any]


def address(value: Any, where: str) -> int:
    """A number written in hexadecimal."""
    if not isinstance(value, str) or not HEXADECIMAL.fullmatch(value):
        raise Wrong(where, value, "a hexadecimal string of up to 64 bits")
    return int(value, 16)


def count(value: Any, where: str) -> int:
    """A number that counts."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST_COUNT:
        raise Wrong(where, value, "a count")
    return value


def change(value: Any, where: str) -> int:
    """A number that may be negative."""
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= LARGEST_COUNT:
        raise Wrong(where, value, "a number")
    return value


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Wrong(where, value, "true or false")
    return value


def text(value: Any, where: str) -> str:
    """Any string."""
    if not isinstance(value, str):
        raise Wrong(where, value, "a string")
    return value


def anything(value: Any, where: str) -> Any:
    """What is not looked at."""
    return value


def one_of(*choices: Any) -> Convert:
    """One of some values."""

    def convert(value: Any, where: str) -> Any:
        if not isinstance(value, type(choices[0])) or value not in choices:
            raise Wrong(where, value, "one of " + ", ".join(map(str, choices)))
        return value

    return convert


def optional(convert: Convert) -> Convert:
    """A value that may be null."""
    return lambda value, where: None if value is None else convert(value, where)


def listed(convert: Convert) -> Convert:
    """A list of values of one kind."""

    def each(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise Wrong(where, value, "a list")
        return [convert(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return each


def row(*converts: Convert) -> Convert:
    """A list of values of different kinds, by their place."""

    def each(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) != len(converts):
            raise Wrong(where, value, f"a list of {len(converts)}")
        return [convert(item, where) for convert, item in zip(converts, value, strict=True)]

    return each


def fields(needed: dict[str, Convert], more: dict[str, Convert] | None = None) -> Convert:
    """An object with these members, those of `more` optional."""
    more = more or {}

    def convert(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Wrong(where, value, "an object")
        for name in value:
            if name not in needed and name not in more:
                raise Wrong(where, name, "a field of the format")
        for name in needed:
            if name not in value:
                raise Wrong(where, name, "this field, which is missing")
        return {name: (needed.get(name) or more[name])(item, f"{where}.{name}" if where else name) for name, item in value.items()}

    return convert


def counters(value: Any, where: str) -> dict[str, int]:
    """Counters by name."""
    if not isinstance(value, dict):
        raise Wrong(where, value, "an object of counters")
    for name in value:
        if name not in COUNTERS:
            raise Wrong(where, name, "a counter of KVM")
    return {name: change(number, f"{where}.{name}") for name, number in value.items()}


def bitmap(value: Any, where: str) -> bytes:
    """Bytes in hexadecimal, tokens `X*N` repeated."""
    out = bytearray()
    try:
        for token in text(value, where).split():
            part, _, times = token.partition("*")
            more = bytes.fromhex(part)
            if not more or len(out) + len(more) * int(times or 1) > LONGEST_BITMAP:
                raise ValueError
            out += more * int(times or 1)
    except ValueError:
        raise Wrong(where, value, "bytes in hexadecimal, X*N for N times X") from None
    return bytes(out)


RUN = fields({"gpa": address, "count": count, "value": address}, {"step": address, "stride": address})
MEMORY = listed(RUN)
OPS: dict[str, Convert] = {
    "LOOPR": row(text, address, address, count),
    "LOOPW": row(text, address, address, count),
    "LOOPX": row(text, address, address, count),
    "EXEC": row(text, address),
    "R8": row(text, address, optional(address)),
    "R4": row(text, address, optional(address)),
    "W8": row(text, address, address),
    "W4": row(text, address, address),
    "CMPX": row(text, address, address, address, optional(address)),
    "INVLPG": row(text, address),
    "CR3": row(text, address),
    "CR0": row(text, address),
    "VMRUN": row(text, address, address),
}


def operation(value: Any, where: str) -> list[Any]:
    """One op of the guest's program."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str) or value[0] not in OPS:
        raise Wrong(where, value, "an op: " + ", ".join(OPS))
    return OPS[value[0]](value, where)


REGS = fields({"rip": address, "rsp": address}, {"commands": address})
L2 = fields({**dict.fromkeys(("vmcb", "ncr3", "cr0", "cr3", "cr4", "efer"), address), "cpl": one_of(0, 3), "regs": REGS})
VMEXIT = fields({"code": address, "info1": address, "info2": address})
GUEST = {"vcpu": count, "cpl": one_of(0, 3), "cr0": address, "cr3": address, "regs": REGS, "ops": listed(operation)}
COUNTED = {"delta": counters, "abs": counters}
GUEST_PF = listed(fields({"op": count, "err": address, "cr2": address, "cpl": count}, {"rip": address, "l2": flag}))
GUEST_EXPECT = {
    "mmio": listed(row(one_of("R", "W"), address, one_of(*range(1, 9)), address)),
    "guest_pf": GUEST_PF,
    "table_words": MEMORY,
}
HOST = fields({"page": one_of("4K", "2M", "1G")}, {"how": text, "hva_minus_gpa_mod_2m": address, "hva_minus_gpa_mod_1g": address})
SLOT_FLAGS = listed(one_of("KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY"))
SLOT = {"change": one_of("create", "flags", "delete"), "slot": count, "gpa": address, "size": address, "flags": SLOT_FLAGS}

GUESTS = ("guest", "nested_guest")
STEPS: dict[str, tuple[dict[str, Convert], dict[str, Convert], dict[str, Convert]]] = {
    # step: (fields, optional fields, members of `expect`)
    "slot": (SLOT, {"host": HOST}, {"nr_mmu_pages": count}),
    "mode": ({"vcpu": count, "cpl": one_of(0, 3), "cr0": address, "cr3": address, "cr4": address, "efer": address}, {}, {}),
    "memory": ({"runs": MEMORY}, {}, {}),
    "enable_cap": ({"cap": one_of("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"), "args": listed(count)}, {"flags": listed(text)}, {}),
    "set_nr_mmu_pages": ({"n": count}, {}, {"nr_mmu_pages": count}),
    "param": ({"name": text, "value": anything}, {"phase": text}, {}),
    "set_msr": ({"vcpu": count, "index": anything, "value": anything}, {}, {}),
    "create_vcpu": ({"vcpu": count}, {}, {}),
    "dirty_get": ({"slot": count, "pages": count}, {}, {"bitmap": bitmap, "count": count}),
    "dirty_clear": ({"slot": count, "first": count, "pages": count, "bitmap": bitmap}, {}, {}),
    "host_read": ({"gpa": address}, {}, {"value": address}),
    "guest": (GUEST, {}, GUEST_EXPECT),
    "nested_guest": ({**GUEST, "l2": L2, "l2ops": listed(operation)}, {}, {**GUEST_EXPECT, "vmexit": VMEXIT}),
}


def step(value: Any, where: str) -> dict[str, Any]:
    """One step, by the table above."""
    kind = value.get("do") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in STEPS:
        raise Wrong(where, kind, "a step: " + ", ".join(STEPS))
    needed, more, expect = STEPS[kind]
    common = {"do": text, "name": text, "info": anything, "expect": fields({}, {**COUNTED, **expect})}
    return fields(needed, {**common, **more})(value, where)


CONFIG: tuple[dict[str, Convert], dict[str, Convert]] = (
    {"npt": flag, "tdp_mmu": flag, "eager_page_split": flag, "nx_huge_pages": one_of("off", "force"), "mmio_caching": flag},
    {"nested": flag, "split_shadow_pages": flag, "split_access": one_of(*SPLIT_ACCESS), "split_on_fault": flag},
)
CPUID = fields({"maxphyaddr": count, "host_maxphyaddr": count}, {name: anything for name in (
    "vendor", "nx", "pdpe1gb", "svm", "smep", "smap", "pku", "la57", "pcid", "svm_npt", "svm_nrips",
)})  # fmt: skip
CPU = fields({"cpuid": CPUID, "cpl": one_of(0, 3), "cr0": address, "cr3": address, "cr4": address, "efer": address})
PLACES = ("code", "code_end", "jump_table", "pf_handler", "nonpaging")
DOCUMENT = fields(
    {
        "format": one_of(FORMAT),
        "config": fields(*CONFIG),
        "scenario": text,
        "cpu": CPU,
        "interpreter": fields(dict.fromkeys(PLACES, address)),
        "memory": MEMORY,
        "steps": listed(step),
    },
    {"kernel": text, "summary": text},
)


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario file.

    Raises:
        TraceError: one line naming the file, the step and field, and what was expected.
    """
    path = Path(path)

    def fail(message: str) -> NoReturn:
        raise TraceError(f"{path}: {message}") from None

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(error.strerror or first_line(error))
    except UnicodeDecodeError:
        fail(f"no text, expected a {FORMAT} document")
    except (ValueError, RecursionError) as error:
        fail(f"not JSON ({first_line(error)}), expected a {FORMAT} document")
    try:
        checked = DOCUMENT(document, "")
        for i, one in enumerate(checked["steps"]):
            check_step(one, f"steps[{i}]")
        ops = [op for one in checked["steps"] for op in (*one.get("ops", ()), *one.get("l2ops", ()))]
        loops = sum(op[3] for op in ops if op[0].startswith("LOOP"))
        if loops > LONGEST_LOOPS:
            raise Wrong("steps", f"{loops:,} iterations of loops", f"at most {LONGEST_LOOPS:,} in a file")
        for run in checked["memory"]:
            check_run(run, "memory")
    except Wrong as error:
        fail(first_line(error))
    return Scenario(
        path.name.removesuffix(".json"), str(path), *(checked[name] for name in ("config", "cpu", "interpreter", "memory", "steps"))
    )


def check_run(run: dict[str, int], where: str) -> None:
    """A run of words lies in memory."""
    stride = run.get("stride", 8)
    last = run["gpa"] + max(run["count"] - 1, 0) * stride
    if run["gpa"] % 8 or stride % 8 or last >= PHYSICAL_LIMIT or (run["count"] > 1 and not stride) or run["count"] > LONGEST_RUN:
        raise Wrong(where, run, f"up to {LONGEST_RUN:,} aligned words below 2^52")


def check_l2(l2: dict[str, Any], ops: list[list[Any]], where: str) -> None:
    """A nested guest pages, and runs none itself."""
    if not l2["cr0"] & int(CR0.PG) or "commands" not in l2["regs"]:
        raise Wrong(where, hex(l2["cr0"]), "a nested guest that pages, with commands")
    for op in ops:
        if op[0] == "VMRUN":
            raise Wrong(f"{where}ops", op[0], "no VMRUN of a nested guest")


def check_step(one: dict[str, Any], where: str) -> None:
    """What the table of steps cannot say."""
    kind = one["do"]
    if kind == "memory":
        for run in one["runs"]:
            check_run(run, f"{where}.runs")
    elif kind == "slot" and (one["gpa"] % PAGE_SIZE or one["size"] % PAGE_SIZE or one["gpa"] + one["size"] > PHYSICAL_LIMIT):
        raise Wrong(where, hex(one["gpa"]), "a gpa and a size that are multiples of 4096, below 2^52")
    elif kind == "enable_cap" and one["args"][:1] not in ([0], [1], [3]):
        raise Wrong(f"{where}.args", one["args"], "0, 1 or 3")
    elif kind == "host_read" and one["gpa"] % 8:
        raise Wrong(f"{where}.gpa", hex(one["gpa"]), "a multiple of 8")
    elif kind == "dirty_clear" and len(one["bitmap"]) != -(-one["pages"] // 8):
        raise Wrong(f"{where}.bitmap", f"{len(one['bitmap'])} bytes", f"one bit for each of {one['pages']} pages")
    elif kind == "dirty_get" and "bitmap" in one.get("expect", {}) and len(one["expect"]["bitmap"]) != -(-one["pages"] // 8):
        raise Wrong(f"{where}.expect.bitmap", f"{len(one['expect']['bitmap'])} bytes", f"one bit for each of {one['pages']} pages")
    elif kind == "set_nr_mmu_pages" and one["n"] < SMALLEST_LIMIT:
        raise Wrong(f"{where}.n", one["n"], f"at least {SMALLEST_LIMIT}: KVM refuses less")
    elif kind in GUESTS:
        for run in one.get("expect", {}).get("table_words", []):
            check_run(run, f"{where}.expect.table_words")
            last = run["gpa"] + max(run["count"] - 1, 0) * run.get("stride", 8)
            if not any(start <= run["gpa"] and last < end for start, end in TABLE_AREAS):
                raise Wrong(f"{where}.expect.table_words", hex(run["gpa"]), "words of the table areas")
        if ("commands" in one["regs"]) != bool(one["cr0"] & int(CR0.PG)):
            raise Wrong(f"{where}.regs", sorted(one["regs"]), "commands exactly where the guest pages")
        if "commands" not in one["regs"] and any(op[0] not in ("LOOPR", "LOOPW") for op in one["ops"]):
            raise Wrong(f"{where}.ops", [op[0] for op in one["ops"]], "LOOPR and LOOPW alone without paging")
        runs = [op[0] for op in one["ops"]].count("VMRUN")
        if runs != (kind == "nested_guest"):
            raise Wrong(f"{where}.ops", f"{runs} VMRUN", "one in a nested_guest step, else none")
        if kind == "nested_guest":
            check_l2(one["l2"], one["l2ops"], f"{where}.l2")
