"""Replay of a kvm-truth/1 document: the host's steps, and the guest program with all accesses of its interpreter.

The format and the interpreter are those of the truth README, sections 2 to 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastmmu.reference.kvm import Machine
from fastmmu.reference.processor import EXCHANGE, TRUTH_HARDWARE, Hardware, NotBuilt, Operand, Outcome, Vcpu
from fastmmu.reference.tables import PAGE, Slot
from fastmmu.reference.walk import PFERR_F, PFERR_U, PFERR_W

WORD = (1 << 64) - 1
TABLES = range(0x100000, 0x6F0000)  # the guest's page tables and the nested ones
GAUGES = (
    "pages_4k",
    "pages_2m",
    "pages_1g",
    "nx_lpage_splits",
    "mmu_unsync",
    "max_mmu_rmap_size",
    "max_mmu_page_hash_collisions",
)
READ, WRITE, FETCH = 0, PFERR_W, PFERR_F
HOST_LEVELS = {"4K": 1, "2M": 2, "1G": 3}
INEXACT = ("slot", "set_nr_mmu_pages")  # steps in which the number of flush requests depends on the host's scheduler
ON = (True, 1, "1", "Y", "y", "on", "force")


@dataclass
class StepResult:
    """What a step did, in the terms of its `expect`."""

    delta: dict[str, int] = field(default_factory=dict)
    abs: dict[str, int] = field(default_factory=dict)
    mmio: list[tuple[str, int, int, int]] = field(default_factory=list)
    guest_pf: list[tuple[int, int, int]] = field(default_factory=list)  # op index, error code, CR2
    loads: list[int | None] = field(default_factory=list)
    bitmap: set[int] | None = None
    table_words: dict[int, int] = field(default_factory=dict)
    nr_mmu_pages: int | None = None
    value: int | None = None
    faults: list[tuple[int, int]] = field(default_factory=list)  # address, error code, in order


class PageFault(Exception):
    """The guest's handler gets it; the op is skipped."""

    def __init__(self, code: int, address: int) -> None:
        super().__init__(f"{code:#x} at {address:#x}")
        self.code, self.address = code, address


def number(text: str) -> int:
    """Addresses, entries, register values and data are hex strings."""
    return int(text, 16)


def expand(runs: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """(gpa, value) of runs of words."""
    for run in runs:
        for i in range(run["count"]):
            address = number(run["gpa"]) + i * number(run.get("stride", "0x8"))
            yield address, (number(run["value"]) + i * number(run.get("step", "0x0"))) & WORD


def bitmap_pages(text: str) -> set[int]:
    """Numbers of the pages that a bitmap has set."""
    data = bytearray()
    for token in text.split():
        digits, _, count = token.partition("*")
        data += bytes.fromhex(digits) * int(count or 1)
    return {8 * i + j for i, byte in enumerate(data) for j in range(8) if byte >> j & 1}


class GuestRun:
    """One guest step: the interpreter and its list of ops."""

    def __init__(self, machine: Machine, step: dict[str, Any], code: dict[str, str], result: StepResult) -> None:
        self.machine, self.result = machine, result
        self.vcpu: Vcpu = machine.vcpus[step["vcpu"]]
        self.ops = step["ops"]
        self.regs = {name: number(value) for name, value in step["regs"].items()}
        self.jump_table = number(code["jump_table"])
        self.user = PFERR_U if self.vcpu.cpl == 3 else 0
        self.size = 8 if "commands" in self.regs else 4  # of a loop's accesses
        supplied = step.get("expect", {}).get("mmio", [])
        self.supplied = [number(data) for direction, _, _, data in supplied if direction == "R"]

    def run(self) -> None:
        """All ops, then the one command that ends the list with an OUT."""
        self.vcpu.enter()
        for index, op in enumerate(self.ops):
            try:
                self.fetch_command(index)
                self.execute(index, op)
            except PageFault as fault:
                self.result.guest_pf.append((index, fault.code, fault.address))
                if op[0] in ("R8", "R4", "CMPX"):
                    self.result.loads.append(None)
                self.handle_page_fault()
        self.fetch_command(len(self.ops))
        self.machine.counters["io_exits"] += 1
        self.vcpu.exit()

    def touch(self, access: int, gva: int, size: int = 8, user: int | None = None, operand: Operand = None) -> Outcome:
        """One access of the interpreter or of an op."""
        outcome = self.vcpu.access(gva, access | (self.user if user is None else user), size, operand)
        if outcome.pferr is not None:
            raise PageFault(outcome.pferr, outcome.address)
        return outcome

    def fetch_command(self, index: int) -> None:
        """Truth README section 4, rule 1; with paging off rule 7."""
        self.touch(FETCH, self.regs["rip"], 1)
        if "commands" in self.regs:
            command = self.regs["commands"] + 64 * index
            for word in range(4):
                self.touch(READ, command + 8 * word)
            self.touch(READ, self.jump_table, 4)
            self.touch(FETCH, self.regs["rip"], 1)

    def execute(self, index: int, op: list[Any]) -> None:
        """Rules 2 and 3."""
        name, address = op[0], number(op[1])
        if name in ("LOOPR", "LOOPW", "LOOPX"):
            for i in range(op[3]):
                self.touch(FETCH, self.regs["rip"], 1)
                self.loop_access(name, address + i * number(op[2]))
        elif name in ("R8", "R4"):
            self.result.loads.append(self.load(address, int(name[1])))
        elif name in ("W8", "W4"):
            self.store(address, int(name[1]), number(op[2]))
        elif name == "CMPX":
            self.result.loads.append(self.compare_exchange(address, number(op[2]), number(op[3])))
        elif name == "EXEC":
            self.call(address)
        elif name == "INVLPG":
            self.vcpu.invlpg(address)
        elif name in ("CR0", "CR3"):
            self.vcpu.write_control(**{name.lower(): address})
        else:
            raise NotBuilt(f"op {name}")
        if name in ("R8", "R4", "CMPX"):
            self.touch(WRITE, self.regs["commands"] + 64 * index + 32)

    def loop_access(self, name: str, address: int) -> None:
        """One round of a loop."""
        if name == "LOOPR":
            self.load(address, self.size)
        elif name == "LOOPW":
            self.store(address, self.size, address)
        else:
            self.call(address)

    def call(self, target: int) -> None:
        """CALL to a RET: push, fetch, pop."""
        self.touch(WRITE, self.regs["rsp"] - 8)
        self.touch(FETCH, target, 1)
        self.touch(READ, self.regs["rsp"] - 8)
        self.touch(FETCH, self.regs["rip"], 1)

    def load(self, gva: int, size: int) -> int:
        """A load; a device's data comes from userspace."""
        return self.read_pieces(self.touch(READ, gva, size))

    def read_pieces(self, outcome: Outcome) -> int:
        """The data of an access, page by page."""
        value = shift = 0
        for gpa, length, device in outcome.pieces:
            if device:
                data = self.supplied.pop(0) if self.supplied else 0
                self.result.mmio.append(("R", gpa, length, data))
            else:
                data = self.machine.memory.load(gpa, length)
            value |= (data & (1 << 8 * length) - 1) << shift
            shift += 8 * length
        return value

    def store(self, gva: int, size: int, value: int) -> None:
        """A store."""
        self.write_pieces(self.touch(WRITE, gva, size, operand=value), value)

    def write_pieces(self, outcome: Outcome, value: int) -> None:
        """To memory, if the emulator has not done it, or to userspace."""
        for gpa, length, device in outcome.pieces:
            data = value & (1 << 8 * length) - 1
            if device:
                self.result.mmio.append(("W", gpa, length, data))
            elif not outcome.stored:
                self.machine.memory.store(gpa, length, data)
            value >>= 8 * length

    def compare_exchange(self, gva: int, new: int, old: int) -> int:
        """A locked cmpxchg; it always writes. KVM emulates it on a device as a read and then a write."""
        outcome = self.vcpu.access(gva, WRITE | self.user, 8, EXCHANGE)
        if outcome.pferr is not None:
            if any(device for _, _, device in outcome.reads):  # user space answered the read before the store faulted
                self.machine.counters["mmio_exits"] += 1
                self.read_pieces(Outcome(outcome.reads))
            raise PageFault(outcome.pferr, outcome.address)
        no_slot = outcome.reads or [(gpa, size, self.machine.memory.kind(gpa) is None) for gpa, size, _ in outcome.pieces]
        if any(device for _, _, device in no_slot):
            self.machine.counters["mmio_exits"] += 1
        found = self.read_pieces(Outcome(no_slot))
        self.write_pieces(outcome, new if found == old else found)
        if outcome.emulated:
            for gpa, length, device in outcome.pieces:
                if not device:
                    self.machine.mmu.table_written(self.vcpu, gpa, length)
        return found

    def handle_page_fault(self) -> None:
        """Delivery, the guest's handler and its IRET: rule 6."""
        stack = (0xA000 if self.user else self.regs["rsp"]) - 8
        code, log = self.regs["rip"], 0x10040
        accesses = [(READ, 0x20E0, 16), (READ, 0x1008, 8)]
        accesses += [(READ, 0x3004, 8)] if self.user else []
        accesses += [(WRITE, stack, 8)] * 6 + [(FETCH, code, 1)] + [(WRITE, stack, 8)] * 2
        accesses += [(READ, 0x10000, 8), (WRITE, 0x10000, 8), (WRITE, log, 8)]
        accesses += [(READ, stack, 8), (WRITE, stack, 8), (READ, stack, 8)]
        accesses += [(READ, 0x1020 if self.user else 0x1008, 8), (READ, stack, 8), (READ, 0x1018 if self.user else 0x1010, 8)]
        for access, gva, size in accesses:
            self.touch(access, gva, size, user=0)
        self.touch(FETCH, code, 1)


class Scenario:
    """A document on its way through a machine."""

    def __init__(self, document: dict[str, Any], hardware: Hardware) -> None:
        self.ran = False  # whether the guest ran already
        config, cpuid = document["config"], document["cpu"]["cpuid"]
        self.machine = Machine(
            npt=config["npt"],
            tdp_mmu=config["tdp_mmu"],
            eager_page_split=config["eager_page_split"],
            nx_huge_pages=config["nx_huge_pages"] in ON,
            mmio_caching=config["mmio_caching"],
            maxphyaddr=cpuid["maxphyaddr"],
            host_maxphyaddr=cpuid.get("host_maxphyaddr", cpuid["maxphyaddr"]),
            page_1g=cpuid.get("pdpe1gb", True),
            hardware=hardware,
            **{name: config[name] for name in ("split_shadow_pages", "split_access", "split_on_fault") if name in config},
        )
        self.code = document["interpreter"]
        self.machine.memory.words.update(expand(document["memory"]))

    def step(self, step: dict[str, Any]) -> StepResult:
        """One step, with what it changed."""
        result = StepResult()
        before = Counter(self.machine.counters)
        handler = getattr(self, "do_" + step["do"], None)
        if handler is None:
            raise NotBuilt("nested paging" if step["do"] in ("nested_guest", "set_msr") else f"step {step['do']}")
        handler(step, result)
        counters = self.machine.counters
        names = set(counters) - ({"remote_tlb_flush_requests"} if step["do"] in INEXACT else set())
        result.delta = {name: counters[name] - before[name] for name in sorted(names) if counters[name] != before[name]}
        result.abs = {name: counters[name] for name in GAUGES}
        return result

    def do_guest(self, step: dict[str, Any], result: StepResult) -> None:
        """A guest run."""
        self.ran = True
        words, vcpu = self.machine.memory.words, self.machine.vcpus[step["vcpu"]]
        before = {gpa: value for gpa, value in words.items() if gpa in TABLES}
        vcpu.faults.clear()
        GuestRun(self.machine, step, self.code, result).run()
        result.faults = list(vcpu.faults)
        changed = {gpa: value for gpa, value in words.items() if gpa in TABLES and value != before.get(gpa, 0)}
        result.table_words = dict(sorted(changed.items()))

    def do_slot(self, step: dict[str, Any], result: StepResult) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        logging = "KVM_MEM_LOG_DIRTY_PAGES" in step["flags"]
        if step["change"] == "create":
            host = step.get("host") or {}
            offset = number(host.get("hva_minus_gpa_mod_2m", "0x0"))
            offsets = {2: offset, 3: number(host.get("hva_minus_gpa_mod_1g", hex(offset)))}
            slot = Slot(number(step["gpa"]) // PAGE, number(step["size"]) // PAGE, "KVM_MEM_READONLY" in step["flags"], logging)
            slot.host_level = HOST_LEVELS[host.get("page", "4K")]
            slot.misaligned = frozenset(level for level, offset in offsets.items() if offset)
            self.machine.create_slot(step["slot"], slot)
            if self.ran:  # new host memory; before the first guest run `memory` says what is in it
                words, span = self.machine.memory.words, range(slot.gfn * PAGE, slot.end * PAGE)
                for gpa in [gpa for gpa in words if gpa in span]:
                    del words[gpa]
        elif step["change"] == "flags":
            self.machine.set_logging(step["slot"], logging)
        else:
            self.machine.delete_slot(step["slot"])
        result.nr_mmu_pages = self.machine.nr_mmu_pages

    def do_mode(self, step: dict[str, Any], result: StepResult) -> None:
        """KVM_SET_SREGS."""
        registers = {name: number(step[name]) for name in ("cr0", "cr3", "cr4", "efer")}
        self.machine.mode(step["vcpu"], step["cpl"], **registers)

    def do_memory(self, step: dict[str, Any], result: StepResult) -> None:
        """The host writes guest memory."""
        self.machine.memory.words.update(expand(step["runs"]))

    def do_host_read(self, step: dict[str, Any], result: StepResult) -> None:
        """The host reads a word."""
        result.value = self.machine.memory.load(number(step["gpa"]), 8)

    def do_enable_cap(self, step: dict[str, Any], result: StepResult) -> None:
        """KVM_ENABLE_CAP."""
        if step["cap"] != "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2":
            raise NotBuilt(step["cap"])
        self.machine.manual_protect = step["args"][0]

    def do_set_nr_mmu_pages(self, step: dict[str, Any], result: StepResult) -> None:
        """KVM_SET_NR_MMU_PAGES."""
        self.machine.set_nr_mmu_pages(step["n"])

    def do_param(self, step: dict[str, Any], result: StepResult) -> None:
        """A module parameter is written; those that are read when a VM is made change nothing."""
        if step["name"] == "nx_huge_pages":
            self.machine.set_nx_huge_pages(step["value"] in ON)
        elif step["name"] == "eager_page_split":
            self.machine.eager_page_split = step["value"] in ON
        elif step["name"] not in ("tdp_mmu", "force_flush_and_sync_on_reuse"):
            raise NotBuilt(f"parameter {step['name']}")

    def do_create_vcpu(self, step: dict[str, Any], result: StepResult) -> None:
        """A further vCPU."""
        self.machine.create_vcpu(step["vcpu"])

    def do_dirty_get(self, step: dict[str, Any], result: StepResult) -> None:
        """KVM_GET_DIRTY_LOG."""
        if not self.machine.memory.memslots[step["slot"]].logging:
            raise ValueError(f"slot {step['slot']} logs no dirty pages")
        result.bitmap = self.machine.dirty_get(step["slot"])

    def do_dirty_clear(self, step: dict[str, Any], result: StepResult) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        pages = {page for page in bitmap_pages(step["bitmap"]) if page < step["pages"]}
        self.machine.dirty_clear(step["slot"], {step["first"] + page for page in pages})


def run_scenario(document: dict[str, Any], *, hardware: Hardware = TRUTH_HARDWARE) -> list[StepResult]:
    """Replay a document, with or without its `expect` members; what userspace supplied for device reads is taken from them.

    Raises:
        NotBuilt: the document needs shadow paging, nested paging, or something else that the model does not have.
    """
    scenario = Scenario(document, hardware)
    return [scenario.step(step) for step in document["steps"]]
