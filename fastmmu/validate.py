"""Scenario files replayed on the model, and everything that a real KVM counted, delivered or changed compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastmmu.audit import audit
from fastmmu.audit_state import AuditError
from fastmmu.bits import PAGE_SIZE
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, MachineError, NotBuilt
from fastmmu.machine_state import KVM_COUNTERS, PER_VCPU, LogKind, Request, SlotFlag, Stop, VmWord
from fastmmu.paging import Cpu
from fastmmu.program import Nested, Program, write_program
from fastmmu.trace.npz import TraceError
from fastmmu.trace.scenario import GUESTS, TABLE_AREAS, Scenario

SMALLEST_MEMORY = 0x800000
NOT_EXACT = {"slot": {"remote_tlb_flush_requests"}, "set_nr_mmu_pages": {"remote_tlb_flush_requests"}}
"""Counters that differed between boots of the measured kernel, by step (truth README section 5)."""
HOST_LEVEL = {"4K": 1, "2M": 2, "1G": 3}
PARAMETER_ON = (True, 1, "Y", "y", "1", "force", "on")
PARAMETER_OFF = (False, 0, "N", "n", "0", "off", "auto")  # auto: no processor of AMD needs NX huge pages
WITHOUT_EFFECT = ("tdp_mmu", "nx_huge_pages_recovery_ratio", "nx_huge_pages_recovery_period_ms")
"""Parameters that a running VM with a direct map does not look at; neither does KVM take nx_huge_pages=never while there is one."""
NESTED_PAGE_FAULT, VMMCALL_EXIT = 0x400, (0x81, 0, 0)  # exit codes of a nested guest, as its hypervisor finds them
NAMES = [counter.name.lower() for counter in KVM_COUNTERS]


@dataclass(frozen=True)
class Difference:
    """A value of a step that differs: what it is, KVM's, and ours."""

    step: int
    what: str
    kvm: Any
    ours: Any


@dataclass
class Validation:
    """What the comparison of one scenario came to."""

    scenario: str
    steps: int
    compared: int = 0
    differ: list[Difference] = field(default_factory=list)

    def check(self, step: int, what: str, kvm: Any, ours: Any) -> None:
        """Compare one value."""
        self.compared += 1
        if kvm != ours:
            self.differ.append(Difference(step, what, kvm, ours))


@dataclass
class Seen:
    """What a step came to, besides counters."""

    mmio: list[tuple[str, int, int, int]] = field(default_factory=list)
    guest_pf: list[tuple[int, int, int, int, bool]] = field(default_factory=list)  # op, error code, CR2, CPL, of a nested guest
    results: dict[int, int | None] = field(default_factory=dict)  # by op
    nested_results: dict[int, int | None] = field(default_factory=dict)
    vmexit: tuple[int, int, int] = VMMCALL_EXIT
    faults: list[tuple[int, int]] = field(default_factory=list)  # address, error code of each fault that exits


class Replay:
    """One scenario on one machine."""

    def __init__(self, scenario: Scenario, *, kvm: Kvm | None = None) -> None:
        """Build the machine.

        Raises:
            NotBuilt: the scenario needs what is not modelled yet.
        """
        self.scenario = scenario
        self.kvm = kvm or kvm_of(scenario)
        slots = [step for step in scenario.steps if step["do"] == "slot"]
        size = max([SMALLEST_MEMORY, *(step["gpa"] + step["size"] for step in slots)])
        used = [step.get("vcpu", 0) for step in scenario.steps]
        self.machine = Machine(self.kvm, self.cpu_of(scenario.cpu), memory=size, vcpus=max(used, default=0) + 1)
        self.machine.configure(log_faults=True, stop_at_fault=True)
        self.started = self.host_wrote = False
        self.registers: dict[int, dict[str, Any]] = {}  # of each vCPU, as they were last set

    def cpu_of(self, step: dict[str, Any], **other: int) -> Cpu:
        """Registers of a step."""
        cpuid = self.scenario.cpu["cpuid"]
        values = {name: step[name] for name in ("cr0", "cr3", "cr4", "efer")} | other
        return Cpu(**values, maxphyaddr=cpuid["maxphyaddr"], page_1g=bool(cpuid.get("pdpe1gb", True)), amd=True)

    def start(self) -> None:
        """Before the first guest step: the guest's memory as it was then."""
        if not self.started:
            self.write_runs(self.scenario.memory)
            self.started = True

    # --- steps

    def run_step(self, step: dict[str, Any]) -> Seen:
        """Do one step."""
        kind = step["do"]
        if kind in GUESTS:
            self.start()
            return self.run_guest(step)
        getattr(self, f"do_{kind}")(step)
        return Seen()

    def event(self, op: Op, **columns: int) -> None:
        """Replay one event."""
        self.machine.run(EventList().add(op, **columns).array())

    def do_slot(self, step: dict[str, Any]) -> None:
        """Create, change or delete a memslot."""
        flags = sum({int(SlotFlag[name.removeprefix("KVM_MEM_")]) for name in step["flags"]})
        if step["change"] == "delete":
            self.event(Op.SLOT_DELETE, address=step["slot"])
        elif step["change"] == "flags":
            self.event(Op.SLOT_FLAGS, address=step["slot"], value=flags)
        else:
            host = step.get("host", {"page": "4K"})
            offset = host.get("hva_minus_gpa_mod_1g", host.get("hva_minus_gpa_mod_2m", 0))
            level = HOST_LEVEL[host["page"]]
            row = self.machine.prepare_slot(step["slot"], step["gpa"], step["size"], flags, host_level=level, hva_offset=offset)
            self.event(Op.SLOT_CREATE, value=row)
            if self.started:  # new host memory
                self.machine.memory.clear(step["gpa"], step["gpa"] + step["size"])

    def do_mode(self, step: dict[str, Any]) -> None:
        """KVM_SET_SREGS."""
        row = self.machine.registers(self.cpu_of(step))
        self.machine.run(EventList().add(Op.VCPU, value=step["vcpu"]).add(Op.MODE, value=row).array())
        self.registers[step["vcpu"]] = step

    def do_memory(self, step: dict[str, Any]) -> None:
        """The host writes guest memory; KVM is not told."""
        self.host_wrote = True
        self.write_runs(step["runs"])

    def do_enable_cap(self, step: dict[str, Any]) -> None:
        """Manual dirty-log protection."""
        word = self.machine.vm.word
        word[VmWord.MANUAL_PROTECT], word[VmWord.INITIALLY_SET] = step["args"][0] & 1, step["args"][0] >> 1 & 1

    def do_set_nr_mmu_pages(self, step: dict[str, Any]) -> None:
        """The limit of shadow pages."""
        self.event(Op.PAGE_LIMIT, value=step["n"])

    def do_param(self, step: dict[str, Any]) -> None:
        """A module parameter changes."""
        which = {
            "nx_huge_pages": VmWord.NX_HUGE_PAGES,
            "eager_page_split": VmWord.EAGER_PAGE_SPLIT,
            "force_flush_and_sync_on_reuse": VmWord.FORCE_SYNC_ON_REUSE,
        }.get(step["name"])
        if step["name"] in WITHOUT_EFFECT or (step["name"] == "nx_huge_pages" and step["value"] == "never"):
            return
        if which is None:
            raise NotBuilt(f"parameter {step['name']} changed at run time")
        if step["value"] not in PARAMETER_ON + PARAMETER_OFF:
            raise ValueError(f"value {step['value']!r}, expected one of {', '.join(map(str, PARAMETER_ON + PARAMETER_OFF))}")
        self.event(Op.PARAMETER, address=which, value=int(step["value"] in PARAMETER_ON))

    def do_create_vcpu(self, step: dict[str, Any]) -> None:
        """A further vCPU: the machine has it already, but what was asked of all vCPUs before does not concern it."""
        self.machine.vm.word[VmWord.REQUESTS + PER_VCPU * step["vcpu"]] = Request.LOAD_ROOT

    def do_set_msr(self, step: dict[str, Any]) -> None:
        """Only VM_HSAVE_PA, where a nested hypervisor keeps its state: no effect on the MMU."""

    def do_host_read(self, step: dict[str, Any]) -> None:
        """The host looks at guest memory: compared with the rest of the step."""
        if step["gpa"] >= self.machine.memory.size:
            raise ValueError(f"gpa {step['gpa']:#x}, expected memory of a memslot")

    def do_dirty_get(self, step: dict[str, Any]) -> None:
        """KVM_GET_DIRTY_LOG."""
        self.event(Op.DIRTY_GET, address=step["slot"])

    def do_dirty_clear(self, step: dict[str, Any]) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        slot = self.machine.slots.get(step["slot"])
        pages = (slot.end - slot.start) // PAGE_SIZE if slot else 0
        last = step["first"] + step["pages"]
        if step["first"] % 64 or last > pages or (step["pages"] % 64 and last != pages):
            what = f"pages {step['first']} to {last}"
            raise ValueError(f"{what}, expected multiples of 64 within slot {step['slot']}'s {pages} pages")
        bits = np.unpackbits(np.frombuffer(step["bitmap"], np.uint8), bitorder="little")[: step["pages"]]
        self.machine.set_report(step["slot"], np.flatnonzero(bits) + step["first"])
        self.event(Op.DIRTY_CLEAR, address=step["slot"])

    def write_runs(self, runs: list[dict[str, int]]) -> None:
        """Runs of words into guest memory."""
        words, size = self.machine.memory.words, self.machine.memory.size
        for run in runs:
            last = run["gpa"] + max(run["count"] - 1, 0) * run.get("stride", 8)
            if last >= size:
                raise ValueError(f"word at {last:#x}, expected memory of a memslot, below {size:#x}")
            index = np.arange(run["count"], dtype=np.uint64)
            where = (np.uint64(run["gpa"]) + index * np.uint64(run.get("stride", 8))) >> np.uint64(3)
            words[where] = np.uint64(run["value"]) + index * np.uint64(run.get("step", 0))

    # --- guest steps

    def run_guest(self, step: dict[str, Any]) -> Seen:
        """The guest executes its list of ops; a #PF is delivered, handled, and the op skipped."""
        machine, seen = self.machine, Seen()
        mode = self.registers.get(step["vcpu"], self.scenario.cpu)
        for name in ("cpl", "cr0", "cr3"):
            if step[name] != mode[name]:
                raise ValueError(f"{name} {step[name]:#x}, expected {mode[name]:#x} as in the vCPU's mode")
        machine.run(EventList().add(Op.VCPU, value=step["vcpu"]).array())
        rows = {}
        for number, op in enumerate(step["ops"]):
            if op[0] == "CR0":
                rows[number] = machine.registers(self.cpu_of(self.registers.get(step["vcpu"], self.scenario.cpu), cr0=op[1]))
        program = write_program(step, self.scenario.interpreter, rows, self.nested_part(step))
        supply = [data for kind, _, _, data in step.get("expect", {}).get("mmio", []) if kind == "R"]
        first, handled = 0, False
        while True:
            run = machine.run(program.events, first, supply=np.array(supply, np.uint64), checked=first > 0)
            reads = self.read_log(run.log, program, seen)
            supply = supply[reads:]
            if run.stop != Stop.GUEST_FAULT:
                break
            op, nested = int(program.op_of[run.stopped]), run.stopped in program.inside
            seen.guest_pf.append((op, run.code, run.address, step["l2"]["cpl"] if nested else step["cpl"], nested))
            handler = program.nested_handler if nested else program.handler
            self.read_log(machine.run(handler, checked=handled).log, program, seen)
            handled = True
            first = program.after_op(run.stopped)
        for results, ops in ((seen.results, step["ops"]), (seen.nested_results, step.get("l2ops", []))):
            for number, op in enumerate(ops):
                if op[0] in ("R8", "R4", "CMPX"):
                    results.setdefault(number, None)
        return seen

    def nested_part(self, step: dict[str, Any]) -> Nested | None:
        """The part of a step that a nested guest executes."""
        if "l2" not in step:
            return None
        l1, l2 = self.cpu_of(self.registers.get(step["vcpu"], self.scenario.cpu)), step["l2"]
        rows = {}
        for number, op in enumerate(step["l2ops"]):
            if op[0] == "CR0":
                rows[number] = self.machine.registers(self.cpu_of(l2, cr0=op[1]))
        vmrun = self.machine.prepare_vmrun(l1, self.cpu_of(l2), l2["ncr3"])
        return Nested({"cpl": l2["cpl"], "regs": l2["regs"], "ops": step["l2ops"]}, vmrun, rows)

    def read_log(self, log: np.ndarray, program: Program, seen: Seen) -> int:
        """Take over what the log tells; how many device reads there were."""
        reads = 0
        for kind, size, event, address, value in log.tolist():
            if kind in (LogKind.MMIO_READ, LogKind.MMIO_WRITE):
                reads += kind == LogKind.MMIO_READ
                seen.mmio.append(("R" if kind == LogKind.MMIO_READ else "W", address, size, value))
            elif kind == LogKind.EXIT:
                seen.faults.append((address, value))
            elif kind == LogKind.NESTED_EXIT:
                seen.vmexit = (NESTED_PAGE_FAULT, value, address)
            elif kind == LogKind.LOADED:
                results = seen.nested_results if event in program.inside else seen.results
                results[int(program.op_of[event])] = value
        return reads


def kvm_of(scenario: Scenario) -> Kvm:
    """The KVM that a scenario ran on, with the artefacts of its emulated processor."""
    config, cpuid = scenario.config, scenario.cpu["cpuid"]
    return Kvm(
        tdp=config["npt"],
        tdp_mmu=config["npt"] and config["tdp_mmu"],
        nx_huge_pages=config["nx_huge_pages"] == "force",
        eager_page_split=config["eager_page_split"],
        mmio_caching=config["mmio_caching"],
        host_maxphyaddr=cpuid["host_maxphyaddr"],
        tlb_flushed_on_exit=True,
        nested=any(step["do"] == "nested_guest" for step in scenario.steps),
        next_rip=bool(cpuid.get("svm_nrips", False)),
        accessed_while_walking=True,
        reserved_without_present=True,
        **{name: config[name] for name in ("split_shadow_pages", "split_access", "split_on_fault") if name in config},
    )


def table_words(words: np.ndarray) -> list[np.ndarray]:
    """A copy of the areas in which page tables lie."""
    return [words[start // 8 : end // 8].copy() for start, end in TABLE_AREAS]


def validate(scenario: Scenario, *, audited: bool = False) -> Validation:
    """Replay a scenario and compare every value that it expects; with `audited`, check the whole state after each step.

    A machine that cannot go on, or whose state does not hold together, is a difference, the last one.

    Raises:
        NotBuilt: the scenario needs what is not modelled yet; TraceError: a step that cannot be done.
    """
    try:
        replay = Replay(scenario)
    except NotBuilt:
        raise
    except ValueError as error:
        raise TraceError(f"{scenario.source}: {error}") from None
    outcome = Validation(scenario.name, len(scenario.steps))
    machine = replay.machine
    for number, step in enumerate(scenario.steps):
        before, tables = machine.counters(), []
        try:
            if step["do"] in GUESTS:
                replay.start()
                tables = table_words(machine.memory.words)
            seen = replay.run_step(step)
            if audited:
                audit(machine, guest_tables=not replay.host_wrote)
        except (MachineError, AuditError) as error:
            outcome.differ.append(Difference(number, "the machine", "goes on", str(error)))
            return outcome
        except NotBuilt:
            raise
        except ValueError as error:
            raise TraceError(f"{scenario.source}: steps[{number}]: {error}") from None
        compare_step(outcome, number, step, replay, seen, before, tables)
    return outcome


def compare_step(
    outcome: Validation,
    number: int,
    step: dict[str, Any],
    replay: Replay,
    seen: Seen,
    before: dict[str, int],
    tables: list[np.ndarray],
) -> None:
    """Compare one step."""
    expect, machine = step.get("expect", {}), replay.machine
    after = machine.counters()
    if "delta" in expect:
        for name in NAMES:
            if name not in NOT_EXACT.get(step["do"], ()):
                outcome.check(number, name, expect["delta"].get(name, 0), after[name] - before[name])
    for name, value in expect.get("abs", {}).items():
        outcome.check(number, f"{name} (total)", value, after[name])
    if "nr_mmu_pages" in expect:
        outcome.check(number, "nr_mmu_pages", expect["nr_mmu_pages"], int(machine.vm.word[VmWord.MAX_PAGES]))
    if "value" in expect:
        outcome.check(number, f"word at {step['gpa']:#x}", hex(expect["value"]), hex(int(machine.memory.words[step["gpa"] // 8])))
    if "bitmap" in expect:
        pages = np.unpackbits(np.frombuffer(expect["bitmap"], np.uint8), bitorder="little")[: step["pages"]].astype(bool)
        compare_bitmaps(outcome, number, pages, machine.report(step["slot"]))
    if "count" in expect:
        outcome.check(number, "dirty pages (count)", expect["count"], int(machine.report(step["slot"]).sum()))
    if step["do"] in GUESTS:
        compare_guest(outcome, number, step, seen)
        compare_tables(outcome, number, expect, machine.memory.words, tables)


def compare_bitmaps(outcome: Validation, number: int, kvm: np.ndarray, ours: np.ndarray) -> None:
    """Page by page, told as one count and the first page that differs."""
    outcome.check(number, "dirty pages", int(kvm.sum()), int(ours.sum()))
    outcome.compared += len(kvm)
    if len(kvm) != len(ours):
        outcome.differ.append(Difference(number, "bitmap length", len(kvm), len(ours)))
    elif (kvm != ours).any():
        page = int(np.flatnonzero(kvm != ours)[0])
        outcome.differ.append(Difference(number, f"dirty page {page}", bool(kvm[page]), bool(ours[page])))


def compare_guest(outcome: Validation, number: int, step: dict[str, Any], seen: Seen) -> None:
    """Device accesses, guest faults, and what ops loaded."""
    expect = step.get("expect", {})
    if "mmio" in expect:
        kvm = [tuple(record) for record in expect["mmio"]]
        outcome.check(number, "device accesses", len(kvm), len(seen.mmio))
        for i, (theirs, ours) in enumerate(zip(kvm, seen.mmio, strict=False)):
            outcome.check(number, f"device access {i}", record_text(theirs), record_text(ours))
    if "guest_pf" in expect:
        outcome.check(number, "guest #PFs", len(expect["guest_pf"]), len(seen.guest_pf))
        for i, (theirs, ours) in enumerate(zip(expect["guest_pf"], seen.guest_pf, strict=False)):
            values = (theirs["op"], theirs["err"], theirs["cr2"], theirs["cpl"], theirs.get("l2", False))
            outcome.check(number, f"guest #PF {i}", fault_text(values), fault_text(ours))
    if "vmexit" in expect:
        kvm_exit = tuple(expect["vmexit"][name] for name in ("code", "info1", "info2"))
        outcome.check(number, "nested exit", exit_text(kvm_exit), exit_text(seen.vmexit))
    compare_results(outcome, number, "op", step["ops"], seen.results)
    compare_results(outcome, number, "nested op", step.get("l2ops", []), seen.nested_results)


def compare_results(outcome: Validation, number: int, what: str, ops: list[list[Any]], results: dict[int, int | None]) -> None:
    """What ops loaded."""
    for op, ours in results.items():
        theirs = ops[op][-1] if ops[op][0] in ("R8", "R4", "CMPX") else ours
        outcome.check(number, f"{what} {op}", *(value if value is None else hex(value) for value in (theirs, ours)))


def record_text(record: tuple[str, int, int, int]) -> str:
    """A device access in words."""
    kind, gpa, size, data = record
    return f"{kind} {gpa:#x} {size} {data & ((1 << 8 * size) - 1):#x}"


def exit_text(exits: tuple[int, int, int]) -> str:
    """A nested exit in words."""
    return "code {:#x} info {:#x} {:#x}".format(*exits)


def fault_text(fault: tuple[int, int, int, int, bool]) -> str:
    """A guest #PF in words."""
    op, code, address, cpl, nested = fault
    return f"{'nested ' * nested}op {op} code {code:#x} cr2 {address:#x} cpl {cpl}"


def compare_tables(outcome: Validation, number: int, expect: dict[str, Any], words: np.ndarray, before: list[np.ndarray]) -> None:
    """Words of the table areas that the step changed."""
    if "table_words" not in expect:
        return
    kvm: dict[int, int] = {}
    for run in expect["table_words"]:
        for i in range(run["count"]):
            kvm[run["gpa"] + i * run.get("stride", 8)] = (run["value"] + i * run.get("step", 0)) % (1 << 64)
    ours: dict[int, int] = {}
    for (start, end), old in zip(TABLE_AREAS, before, strict=True):
        new = words[start // 8 : end // 8]
        ours.update({start + 8 * int(i): int(new[i]) for i in np.flatnonzero(new != old)})
    for gpa in sorted(kvm.keys() | ours.keys()):
        theirs = kvm.get(gpa)
        mine = ours.get(gpa)
        outcome.check(
            number, f"table word {gpa:#x}", theirs if theirs is None else hex(theirs), mine if mine is None else hex(mine)
        )
