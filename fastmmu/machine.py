"""The Python face of the KVM model: a virtual machine with memslots and vCPUs that replays events, and is checked before it does.

Compiled code checks no bounds; every event, slot and register that reaches it passes through here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmmu.bits import GPTE64, PAGE_SIZE, PFERR, PHYSICAL_LIMIT, field
from fastmmu.checks import checked_int
from fastmmu.drive import drive
from fastmmu.events import EVENT, EventList, Op
from fastmmu.kvm import FLAGS, Kvm, set_spte_masks
from fastmmu.machine_state import (
    LOG,
    MEMSLOT,
    REQUESTS,
    SHADOW_PAGE,
    TABLE_WORDS,
    VCPU_WORDS,
    Counter,
    KvmState,
    RegisterTable,
    Request,
    SlotFlag,
    Stop,
    VcpuState,
    VcpuWord,
    VmWord,
)
from fastmmu.memory import GuestMemory, reserve
from fastmmu.paging import Cpu, Mode, PlainColumn, permission_bytes, plain_checks, reserved_masks
from fastmmu.processor import load_registers
from fastmmu.state import TRAIL_LENGTH, MemoryState, MmuState, Reg, SlotKind

LOG_ROWS = 1 << 14
SLOT_WORDS = 1 << 33  # room for what memslots keep by page: 32 TiB of memory; it costs only what is used
PARAMETERS = (VmWord.NX_HUGE_PAGES, VmWord.EAGER_PAGE_SPLIT)
"""Module parameters that may change while a VM runs."""


class MachineError(RuntimeError):
    """The machine cannot go on: KVM itself would fail, the model's pool is used up, or the guest faults for ever."""


class NotBuilt(ValueError):
    """What is asked for is not modelled yet; the message names it."""


@dataclass(frozen=True)
class Run:
    """What a replay came to: index of the event that ended it (or their number), why, with which address and code, and its log."""

    stopped: int
    stop: Stop
    address: int
    code: int
    log: np.ndarray


@dataclass(frozen=True)
class MemslotInfo:
    """A memslot as Python follows it: byte addresses, flags, and its row among the prepared ones."""

    start: int
    end: int
    flags: int
    row: int


class Machine:
    """A virtual machine on a modelled KVM.

    Attributes:
        memory: GuestMemory; write guest page tables and data into `memory.words`.
        kvm: how it is run.
        vcpus: how many processors it has.
        slots: memslots by id, as the last run left them.
        slot_words_used: words of `vm.slot_words` that memslots have taken.
    """

    def __init__(self, kvm: Kvm, cpu: Cpu, *, memory: int = 1 << 32, vcpus: int = 1, tables: int = 1 << 18) -> None:
        """Make a VM without memslots.

        Args:
            kvm: how KVM runs it.
            cpu: registers of every vCPU at the start.
            memory: bytes of guest physical address space that memslots may lie in.
            vcpus: number of processors, 1 to 1024.
            tables: capacity for tables of sptes; 4 KiB each, as far as they are used.

        Raises:
            ValueError: a value out of range; NotBuilt: PAE paging in the guest.
        """
        if not isinstance(kvm, Kvm) or not isinstance(cpu, Cpu):
            raise ValueError(f"expected a Kvm and a Cpu, not {type(kvm).__name__} and {type(cpu).__name__}")
        self.kvm = kvm
        self.memory = GuestMemory(memory)
        self.vcpus = checked_int(vcpus, 1, 1024, "vcpus", "an int from 1 to 1024")
        tables = checked_int(tables, 16, 1 << 26, "tables", "an int from 16 to 2^26")
        self.slots: dict[int, MemslotInfo] = {}
        self._maxphyaddr = cpu.maxphyaddr
        self._prepared = np.zeros(0, MEMSLOT)
        self._cpus: list[Cpu] = []
        self._table = RegisterTable(MmuState(*(np.zeros(0),) * 4), np.zeros(0))
        self._log = np.zeros(LOG_ROWS, LOG)
        self._make_vm(tables)
        self._make_vcpus(cpu)

    # --- making it

    def _make_vm(self, tables: int) -> None:
        word = np.zeros(REQUESTS + self.vcpus, np.uint64)
        word[VmWord.VCPUS] = self.vcpus
        word[REQUESTS:] = Request.LOAD_ROOT
        kvm = self.kvm
        for name in FLAGS:
            if name != "page_1g":
                word[VmWord[name.upper()]] = getattr(kvm, name)
        word[VmWord.ROOT_LEVEL] = (5 if self._maxphyaddr > 48 else 4) if kvm.tdp else 2
        word[VmWord.MAX_LEVEL] = 3 if kvm.page_1g else 2
        set_spte_masks(word, kvm)
        word[VmWord.GENERATION] = kvm.generation
        word[VmWord.MAX_GFN] = (1 << (kvm.host_maxphyaddr - 12)) - 1
        word[VmWord.FRESH_TABLE] = 1
        word[VmWord.STOP_WHEN_FULL] = 1
        word[VmWord.MAX_PAGES] = 64
        mem = MemoryState(self.memory.words, self.memory.state.halves, np.zeros(1, MEMSLOT), np.int64(0), np.uint64(0))
        spt = np.zeros(tables * TABLE_WORDS, np.uint64)
        slot_words = np.frombuffer(reserve(SLOT_WORDS * 8), np.uint64)
        self.slot_words_used = 0
        self.vm = KvmState(mem, spt, np.zeros(tables, SHADOW_PAGE), slot_words, word)

    def _make_vcpus(self, cpu: Cpu) -> None:
        count, (sets, ways) = self.vcpus, self.kvm.tlb

        def rows(*shape: int) -> np.ndarray:
            return np.zeros((count, *shape), np.uint64)

        mmu = MmuState(rows(len(Reg)), rows(16), np.zeros((count, 16), np.uint8), rows(16, len(PlainColumn)))
        own, stat = rows(VCPU_WORDS), np.zeros((count, len(Counter)), np.int64)
        self.state = VcpuState(mmu, rows(TRAIL_LENGTH), own, rows(sets + 1, ways, 2), stat)
        self.state.tlb[:, -1, 0, 0] = 1  # the first epoch
        self.state.own[:, VcpuWord.NUMBER] = np.arange(count)
        mmu.reg[:, Reg.GENERATION] = self.kvm.generation
        row = self.registers(cpu)
        self.run(EventList().each_vcpu(count, Op.MODE, value=row).array())

    def registers(self, cpu: Cpu) -> int:
        """Row of these registers, for MODE and REGISTERS events.

        Raises:
            ValueError: another MAXPHYADDR than the machine's; NotBuilt: PAE.
        """
        if not isinstance(cpu, Cpu):
            raise ValueError(f"cpu: {type(cpu).__name__}, expected a Cpu")
        if cpu in self._cpus:
            return self._cpus.index(cpu)
        if cpu.maxphyaddr != self._maxphyaddr:
            raise ValueError(f"maxphyaddr: {cpu.maxphyaddr}, expected {self._maxphyaddr}, the machine's")
        if cpu.mode == Mode.PAE:
            raise NotBuilt("PAE paging in the guest")
        self._check_cr3(cpu.cr3)
        self._cpus.append(cpu)
        reg = np.zeros((len(self._cpus), len(Reg)), np.uint64)
        for row, one in zip(reg, self._cpus, strict=True):
            load_registers(row, one)
        derived = (np.array([make(one) for one in self._cpus]) for make in (reserved_masks, permission_bytes, plain_checks))
        raw = np.array([(one.cr0, one.cr4, one.efer) for one in self._cpus], np.uint64)
        self._table = RegisterTable(MmuState(reg, *derived), raw)
        return len(self._cpus) - 1

    def prepare_slot(self, slot: int, gpa: int, size: int, flags: int = 0, *, host_level: int = 1, hva_offset: int = 0) -> int:
        """Row of a memslot for a SLOT_CREATE event.

        Args:
            slot: its id, 0 to 509.
            gpa, size: bytes, multiples of 4096, within the machine's memory.
            flags: SlotFlag bits.
            host_level: level at which the host maps the memory, 1 to 3.
            hva_offset: host virtual minus guest physical address, bytes: where it is no multiple of a huge page's size, huge pages
                of that size are impossible.

        Raises:
            ValueError: a value out of range.
        """
        identity = checked_int(slot, 0, 509, "slot", "an id from 0 to 509")
        gpa = checked_int(gpa, 0, self.memory.size, f"slot {slot}: gpa", f"an address up to {self.memory.size:#x}")
        size = checked_int(size, PAGE_SIZE, self.memory.size - gpa, f"slot {slot}: size", "bytes within the machine's memory")
        flags = checked_int(flags, 0, 3, f"slot {slot}: flags", "SlotFlag bits")
        host_level = checked_int(host_level, 1, 3, f"slot {slot}: host_level", "1, 2 or 3")
        hva_offset = checked_int(hva_offset, -PHYSICAL_LIMIT, PHYSICAL_LIMIT, f"slot {slot}: hva_offset", "bytes")
        if gpa % PAGE_SIZE or size % PAGE_SIZE or hva_offset % PAGE_SIZE:
            raise ValueError(
                f"slot {slot}: gpa {gpa:#x}, size {size:#x}, hva_offset {hva_offset:#x}, expected multiples of {PAGE_SIZE}"
            )
        row = np.zeros((), MEMSLOT)
        row["start"], row["end"], row["id"], row["flags"], row["host_level"] = gpa, gpa + size, identity, flags, host_level
        row["kind"] = SlotKind.ROM if flags & SlotFlag.READONLY else SlotKind.RAM
        row["base"], row["pages"] = gpa // PAGE_SIZE, size // PAGE_SIZE
        self._add_slot_words(row, hva_offset // PAGE_SIZE)
        self._prepared = np.append(self._prepared, row)
        return len(self._prepared) - 1

    def _add_slot_words(self, row: np.ndarray, offset: int) -> None:
        """Give a memslot its words: bitmaps, counts against huge pages, reverse map. They cost memory only where they are used."""
        base, pages = int(row["base"]), int(row["pages"])
        end = self.slot_words_used
        for name in ("dirty", "written", "report"):
            row[name] = end
            end += -(-pages // 64)
        frames = {level: ((base + pages - 1) >> 9 * (level - 1)) - (base >> 9 * (level - 1)) + 1 for level in (1, 2, 3)}
        for name in ("disallow", "rmap"):
            for level in (1, 2, 3):
                row[name][level] = end
                end += frames[level]
        words = self.vm.slot_words
        if end > len(words):
            raise ValueError(f"slot {int(row['id'])}: {pages} pages, expected fewer: the room for all memslots is used up")
        for level in (2, 3):
            inside = (1 << 9 * (level - 1)) - 1
            first = int(row["disallow"][level])
            counts = words[first : first + frames[level]]
            counts[0] += np.uint64(base & inside != 0)
            counts[-1] += np.uint64((base + pages) & inside != 0)
            if offset & inside:
                counts += np.uint64(1)
        self.slot_words_used = end
        slots = self.vm.mem.slots
        if len(slots) <= len(self._prepared):
            slots = np.append(slots, np.zeros(len(slots), MEMSLOT))
        self.vm = self.vm._replace(mem=self.vm.mem._replace(slots=slots))

    # --- running it

    def run(self, events: np.ndarray, first: int = 0, *, supply: np.ndarray | None = None, checked: bool = False) -> Run:
        """Replay events from index `first` on.

        Args:
            events: EVENT rows.
            supply: uint64, data of the device reads in order; zeros beyond.
            checked: `check` has seen these events since the last ones that changed memslots or registers.

        Returns:
            The run; its log is a copy.

        Raises:
            ValueError: an event that cannot be replayed; NotBuilt: guest paging without tdp; MachineError: see there.
        """
        if not checked:
            self.check(events)
        first = checked_int(first, 0, len(events), "first", f"an index up to {len(events)}")
        if not (events.flags.c_contiguous and events.flags.writeable):
            events = events.copy()  # the kernel is compiled for plain arrays
        supply = self._checked_supply(supply)
        word = self.vm.word
        word[VmWord.LOGGED] = word[VmWord.SUPPLIED] = 0
        logs = []
        try:
            while True:
                stopped = int(drive(self.vm, self.state, self._table, self._prepared, self._log, supply, events, first))
                logs.append(self._log[: int(word[VmWord.LOGGED])].copy())
                stop = Stop(int(word[VmWord.STOP]))
                if stop != Stop.LOG_FULL:
                    break
                word[VmWord.LOGGED], first = 0, stopped
        finally:
            self._follow_slots()
        if stop == Stop.SHADOW_PAGING:
            raise NotBuilt("shadow paging")
        if stop in ERRORS:
            address, code = int(word[VmWord.STOP_ADDRESS]), int(word[VmWord.STOP_CODE])
            raise MachineError(f"event {stopped}, address {address:#x}, access {code:#x}: {ERRORS[stop]}")
        return Run(stopped, stop, int(word[VmWord.STOP_ADDRESS]), int(word[VmWord.STOP_CODE]), np.concatenate(logs))

    @staticmethod
    def _checked_supply(supply: np.ndarray | None) -> np.ndarray:
        try:
            data = np.array([] if supply is None else supply, np.uint64)
        except (OverflowError, TypeError, ValueError):
            raise ValueError("supply: expected uint64 values") from None
        if data.ndim != 1:
            raise ValueError(f"supply: {data.ndim} dimensions, expected one")
        return data

    def configure(
        self, *, log_faults: bool = False, log_accesses: bool = False, stop_at_fault: bool = False, keep_log: bool = True
    ) -> None:
        """Choose what a run tells.

        Args:
            log_faults: log each fault that exits to KVM, besides device accesses, guest #PFs and loads.
            log_accesses: log where each access went.
            stop_at_fault: a guest #PF ends the run, which names the event.
            keep_log: False to keep only the first rows of the log: for long streams whose log nobody reads.
        """
        word = self.vm.word
        word[VmWord.LOG_FAULTS], word[VmWord.LOG_ACCESSES], word[VmWord.STOP_AT_FAULT] = log_faults, log_accesses, stop_at_fault
        word[VmWord.STOP_WHEN_FULL] = keep_log

    def counters(self) -> dict[str, int]:
        """KVM's counters and ours about the processor, by name, of the VM and all its vCPUs."""
        totals = self.state.stat.sum(axis=0)
        counters = {counter.name.lower(): int(totals[counter]) for counter in Counter}
        counters["max_mmu_page_hash_collisions"] = int(self.state.stat[:, Counter.MAX_MMU_PAGE_HASH_COLLISIONS].max())
        return counters

    def _report_words(self, slot: int) -> tuple[np.ndarray, int]:
        if slot not in self.slots:
            raise ValueError(f"slot: {slot!r}, expected one of {sorted(self.slots)}")
        row = self._prepared[self.slots[slot].row]
        start, pages = int(row["report"]), int(row["pages"])
        return self.vm.slot_words[start : start - (-pages // 64)], pages

    def report(self, slot: int) -> np.ndarray:
        """What the last DIRTY_GET of the slot returned: bool[pages].

        Raises:
            ValueError: there is no such slot.
        """
        words, pages = self._report_words(slot)
        return np.unpackbits(words.view(np.uint8), bitorder="little")[:pages].astype(bool)

    def set_report(self, slot: int, pages: np.ndarray) -> None:
        """Name the pages, by number within the slot, that the next DIRTY_CLEAR of it clears.

        Raises:
            ValueError: there is no such slot, or no such page.
        """
        words, count = self._report_words(slot)
        numbers = np.asarray(pages)
        if numbers.size and (numbers.ndim != 1 or numbers.dtype.kind not in "ui" or numbers.min() < 0 or numbers.max() >= count):
            raise ValueError(f"pages of slot {slot}: expected numbers from 0 to {count - 1}")
        bits = np.zeros(len(words) * 64, bool)
        bits[numbers.astype(np.int64)] = True
        words[:] = np.packbits(bits, bitorder="little").view(np.uint64)

    # --- checking what goes into it

    def _check_cr3(self, cr3: int) -> None:
        if cr3 & int(GPTE64.ADDR) >> self._maxphyaddr << self._maxphyaddr:
            raise ValueError(f"cr3: {cr3:#x}, expected an address of {self._maxphyaddr} bits")

    def check(self, events: np.ndarray) -> None:
        """Refuse what compiled code would trust.

        Raises:
            ValueError: naming the event and what was expected.
        """
        if not isinstance(events, np.ndarray) or events.dtype != EVENT or events.ndim != 1:
            raise ValueError(f"events: {getattr(events, 'dtype', type(events).__name__)}, expected EVENT rows")
        op, access, address, value = (events[name] for name in ("op", "access", "address", "value"))

        def refuse(bad: np.ndarray, column: str, expected: str) -> None:
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                name = Op(int(op[at])).name if op[at] < len(Op) else "event"
                raise ValueError(f"event {at}, {name}: {column} {int(events[column][at]):#x}, expected {expected}")

        refuse(op >= len(Op), "op", f"an operation up to {len(Op) - 1}")
        refuse(op == Op.GENERATION, "op", "memslot events instead: the machine keeps the generation")
        touches, data = np.isin(op, ACCESSES), np.isin(op, DATA)
        known = np.uint8(PFERR.W | PFERR.U | PFERR.F)
        refuse(touches & (access & ~known != 0), "access", "W, U and F alone")
        refuse(
            touches & (access & known & np.uint8(PFERR.W | PFERR.F) == PFERR.W | PFERR.F), "access", "a write or a fetch, not both"
        )
        refuse(data & ((events["size"] == 0) | (events["size"] > 8)), "size", "1 to 8 bytes")
        refuse(data & (access & np.uint8(PFERR.F) != 0), "access", "no fetch")
        refuse((op == Op.LOAD) & (access & np.uint8(PFERR.W) != 0), "access", "a read")
        refuse(np.isin(op, (Op.WRITE, Op.EXCHANGE)) & (access & np.uint8(PFERR.W) == 0), "access", "a write")
        behind = np.append(op[1:], len(Op))
        refuse((op == Op.EXCHANGE) & (behind != Op.OPERAND), "op", "an OPERAND event behind it")
        width = 57 if any(cpu.mode == Mode.LONG5 for cpu in self._cpus) else 48
        last = address + np.where(data, events["size"], 1).astype(np.uint64) - np.uint64(1)
        canonical = is_canonical(address, width) & is_canonical(last, width) & (last >= address)
        refuse((touches | (op == Op.INVLPG)) & ~canonical, "address", "a canonical address")
        bits = self._maxphyaddr if self.kvm.tdp else 32
        bad_store = (address & np.uint64(7) != 0) | (address >= np.uint64(1 << bits))
        refuse((op == Op.STORE) & bad_store, "address", f"a multiple of 8 below 2^{bits}")
        outside = value & GPTE64.ADDR & ~field(self._maxphyaddr - 1, 0) != 0
        refuse((op == Op.CR3) & outside, "value", f"an address of {self._maxphyaddr} bits")
        refuse((op == Op.VCPU) & (value >= self.vcpus), "value", f"a vCPU below {self.vcpus}")
        refuse(np.isin(op, (Op.MODE, Op.REGISTERS)) & (value >= len(self._cpus)), "value", "a row of registers()")
        refuse((op == Op.PARAMETER) & (~np.isin(address, PARAMETERS) | (value > 1)), "address", "NX_HUGE_PAGES or EAGER_PAGE_SPLIT")
        refuse((op == Op.PAGE_LIMIT) & (value < 64), "value", "at least 64, as KVM demands")
        page = np.uint64(PAGE_SIZE - 1)
        span = (address & page != 0) | (value & page != 0) | (address >= value) | (value > PHYSICAL_LIMIT)
        refuse((op == Op.UNMAP) & span, "address", "a range of whole pages")
        self._check_slots(events)

    def _check_slots(self, events: np.ndarray) -> None:
        """Follow memslots through the stream: ids must exist, slots must not overlap."""
        slots = dict(self.slots)
        for at in np.flatnonzero(np.isin(events["op"], SLOT_EVENTS)).tolist():
            op, identity, value = Op(int(events["op"][at])), int(events["address"][at]), int(events["value"][at])

            def refuse(bad: bool, column: str, expected: str, at: int = at, op: Op = op) -> None:
                if bad:
                    raise ValueError(f"event {at}, {op.name}: {column} {int(events[column][at]):#x}, expected {expected}")

            if op == Op.SLOT_CREATE:
                refuse(value >= len(self._prepared), "value", "a row of prepare_slot()")
                row = self._prepared[value]
                start, end, identity = (int(row[name]) for name in ("start", "end", "id"))
                clash = identity in slots or any(start < other.end and other.start < end for other in slots.values())
                refuse(clash, "value", f"a free id and range; slot {identity} is taken or overlaps another")
                slots[identity] = MemslotInfo(start, end, int(row["flags"]), value)
                continue
            refuse(identity not in slots, "address", "the id of a memslot")
            old = slots[identity]
            if op == Op.SLOT_DELETE:
                del slots[identity]
            elif op == Op.SLOT_FLAGS:
                refuse((value ^ old.flags) & ~int(SlotFlag.LOG_DIRTY_PAGES) != 0, "value", "no flag changed but LOG_DIRTY_PAGES")
                slots[identity] = MemslotInfo(old.start, old.end, value, old.row)
            else:
                refuse(not old.flags & SlotFlag.LOG_DIRTY_PAGES, "address", "a memslot that logs dirty pages")

    def _follow_slots(self) -> None:
        """The memslots as the run left them."""
        active = self.vm.mem.slots
        active = active[active["start"] < active["end"]]
        rows = {int(dirty): row for row, dirty in enumerate(self._prepared["dirty"])}
        self.slots = {
            int(slot["id"]): MemslotInfo(int(slot["start"]), int(slot["end"]), int(slot["flags"]), rows[int(slot["dirty"])])
            for slot in active
        }


def is_canonical(gva: np.ndarray, width: int) -> np.ndarray:
    """Whether the bits of an address from `width` - 1 up are all the same."""
    shift = np.uint64(64 - width)
    return ((gva << shift).view(np.int64) >> shift.astype(np.int64)).view(np.uint64) == gva


ACCESSES = (Op.ACCESS, Op.DEVICE, Op.LOAD, Op.WRITE, Op.EXCHANGE)
DATA = (Op.LOAD, Op.WRITE, Op.EXCHANGE)
SLOT_EVENTS = (Op.SLOT_CREATE, Op.SLOT_DELETE, Op.SLOT_FLAGS, Op.DIRTY_GET, Op.DIRTY_CLEAR)
ERRORS = {
    Stop.NO_TABLES: "the machine's pool of tables is used up, expected a larger `tables`",
    Stop.NO_PAGES: "no shadow page is free under the limit: KVM_RUN fails with ENOSPC",
    Stop.NO_PROGRESS: "the access faults for ever: the guest makes no progress",
    Stop.DEVICE_FETCH: "an instruction fetched from a device: KVM cannot emulate it",
}
