"""The Python face of the KVM model: a virtual machine with memslots and vCPUs that replays events, and is checked before it does.

Compiled code checks no bounds; every event, slot and register that reaches it passes through here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fastmmu.bits import CR0, CR4, GPTE64, PAGE_SIZE, PHYSICAL_LIMIT
from fastmmu.checks import checked_int
from fastmmu.drive import drive
from fastmmu.ept import EptCaps, checked_eptp
from fastmmu.event_checks import Limits, MemslotInfo, check_events
from fastmmu.events import EventList, Op
from fastmmu.kvm import FLAGS, SPLIT_ACCESS, Kvm, set_spte_masks
from fastmmu.machine_state import (
    LOG,
    MEMSLOT,
    PER_VCPU,
    SHADOW_PAGE,
    STAT_WORDS,
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
    Words,
)
from fastmmu.memory import GuestMemory, reserve
from fastmmu.paging import Cpu, Mode, PlainColumn
from fastmmu.processor import Ept12, tables_of
from fastmmu.rmap import DESC_WORDS
from fastmmu.state import TRAIL_LENGTH, MemoryState, MmuState, Reg, SlotKind

LOG_ROWS = 1 << 14
SLOT_WORDS = 1 << 33  # room for what memslots keep by page: 32 TiB of memory; it costs only what is used


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


class Machine:
    """A virtual machine on a modelled KVM.

    Attributes:
        memory: GuestMemory; write guest page tables and data into `memory.words`.
        kvm: how it is run.
        vcpus: how many processors it has.
        slots: memslots by id, as the last run left them.
        slot_words_used: words of `vm.slot_words` that memslots have taken.

    Example:
        >>> from fastmmu import WRITE, Cpu, EventList, Kvm, Machine, Op
        >>> machine = Machine(Kvm(), Cpu(cr0=1, cr3=0, cr4=0, efer=0), memory=1 << 30)  # without paging: gva is gpa
        >>> slot = machine.prepare_slot(0, gpa=0, size=1 << 30, host_level=2)
        >>> events = EventList().add(Op.SLOT_CREATE, value=slot).access(0x5000, WRITE).access(0x6000, 0)
        >>> machine.run(events.array()).stop.name, machine.counters()["pf_fixed"], machine.counters()["pages_2m"]
        ('END', 1, 1)
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
            ValueError: a value out of range; NotBuilt: PAE paging in the guest with two-dimensional paging.
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
        self._rows: list[Cpu | Ept12] = []
        self._vmruns: set[int] = set()
        self._table = RegisterTable(MmuState(*(np.zeros(0),) * 4), np.zeros(0))
        self._log = np.zeros(LOG_ROWS, LOG)
        self._make_vm(tables)
        self._make_vcpus(cpu)

    @property
    def cpus(self) -> tuple[Cpu, ...]:
        """The register settings that its vCPUs have had so far."""
        return tuple(row for row in self._rows if isinstance(row, Cpu))

    # --- making it

    def _make_vm(self, tables: int) -> None:
        word = np.zeros(VmWord.REQUESTS + PER_VCPU * self.vcpus, np.uint64)
        word[VmWord.VCPUS] = self.vcpus
        word[VmWord.REQUESTS :: PER_VCPU] = Request.LOAD_ROOT
        kvm = self.kvm
        for name in FLAGS:
            if name not in ("page_1g", "nested"):
                word[VmWord[name.upper()]] = getattr(kvm, name)
        word[VmWord.SPLIT_ACCESS] = SPLIT_ACCESS[kvm.split_access]
        word[VmWord.ROOT_LEVEL] = 5 if self._maxphyaddr > 48 else 4
        word[VmWord.MAX_LEVEL] = 3 if kvm.page_1g else 2
        set_spte_masks(word, kvm)
        word[VmWord.GENERATION] = kvm.generation
        word[VmWord.MAX_GFN] = (1 << ((kvm.host_maxphyaddr if kvm.tdp else 52) - 12)) - 1
        word[VmWord.FRESH_TABLE] = 1
        word[VmWord.FRESH_DESC] = DESC_WORDS
        word[VmWord.STOP_WHEN_FULL] = 1
        word[VmWord.MAX_PAGES] = 64
        mem = MemoryState(self.memory.words, self.memory.state.halves, np.zeros(1, MEMSLOT), np.int64(0), np.uint64(0))
        spt, shadowed = (np.frombuffer(reserve(tables * PAGE_SIZE, huge=True), np.uint64) for _ in range(2))
        desc = np.frombuffer(reserve(tables * TABLE_WORDS * int(DESC_WORDS) * 8), np.uint64)
        slot_words = np.frombuffer(reserve(SLOT_WORDS * 8), np.uint64)
        self.slot_words_used = 0
        self.vm = KvmState(mem, spt, shadowed, desc, np.zeros(tables, SHADOW_PAGE), slot_words, None, word)

    def _make_vcpus(self, cpu: Cpu) -> None:
        count, (sets, ways) = self.vcpus, self.kvm.tlb

        def rows(*shape: int) -> np.ndarray:
            return np.zeros((count, *shape), np.uint64)

        mmu = MmuState(rows(len(Reg)), rows(16), np.zeros((count, 16), np.uint8), rows(16, len(PlainColumn)))
        own, stat = rows(VCPU_WORDS), np.zeros((count, STAT_WORDS), np.int64)
        nested = other = None
        if self.kvm.nested:
            nested = MmuState(rows(len(Reg)), rows(16), np.zeros((count, 16), np.uint8), rows(16, len(PlainColumn)))
            nested.reg[:, Reg.GENERATION] = self.kvm.generation
            other = Words(rows(VCPU_WORDS))
            other.own[:, VcpuWord.NUMBER], other.own[:, VcpuWord.NESTED] = np.arange(count), 1
        tlb = rows(sets + 1, 1 + 2 * (-(-ways // 4) * 4))
        self.state = VcpuState(mmu, rows(TRAIL_LENGTH), own, tlb, stat, nested, other)
        self.state.tlb[:, -1, 0], self.state.tlb[:, -1, 1] = 1 << 52, ways
        self.state.own[:, VcpuWord.NUMBER] = np.arange(count)
        mmu.reg[:, Reg.GENERATION] = self.kvm.generation
        row = self.registers(cpu)
        self.run(EventList().each_vcpu(count, Op.MODE, value=row).array())

    def registers(self, cpu: Cpu) -> int:
        """Row of these registers, for MODE and REGISTERS events.

        Raises:
            ValueError: another MAXPHYADDR than the machine's, protection keys under shadow paging; NotBuilt: PAE with tdp.
        """
        if not isinstance(cpu, Cpu):
            raise ValueError(f"cpu: {type(cpu).__name__}, expected a Cpu")
        if cpu in self._rows:
            return self._rows.index(cpu)
        if cpu.maxphyaddr != self._maxphyaddr:
            raise ValueError(f"maxphyaddr: {cpu.maxphyaddr}, expected {self._maxphyaddr}, the machine's")
        if cpu.mode == Mode.PAE and self.kvm.tdp:
            raise NotBuilt("PAE paging in the guest with two-dimensional paging")
        if not self.kvm.tdp and cpu.cr4 & int(CR4.PKE):
            raise ValueError("cr4: PKE, expected none without tdp: KVM offers no protection keys under shadow paging")
        if cpu.cr3 & int(GPTE64.ADDR) >> self._maxphyaddr << self._maxphyaddr:
            raise ValueError(f"cr3: {cpu.cr3:#x}, expected an address of {self._maxphyaddr} bits")
        return self._add_row(cpu)

    def _add_row(self, one: Cpu | Ept12) -> int:
        """A row of the register table."""
        if one not in self._rows:
            self._rows.append(one)
            columns = zip(*(tables_of(row) for row in self._rows), strict=True)
            raw = [(row.cr0, row.cr4, row.efer) if isinstance(row, Cpu) else (0, 0, 0) for row in self._rows]
            self._table = RegisterTable(MmuState(*map(np.array, columns)), np.array(raw, np.uint64))
        return self._rows.index(one)

    def prepare_vmrun(self, l1: Cpu, l2: Cpu, tables: int) -> int:
        """Rows of registers for a VMRUN event: those of the nested guest, and those by which KVM walks the tables that it is given.

        Args:
            l1: registers of the hypervisor, which with NPT pages in long mode.
            l2: registers of its guest.
            tables: of the tables from `l2`'s physical addresses to those of `l1`: with NPT the nested CR3, with EPT the EPTP.

        Raises:
            ValueError: the machine has no nested guests, or a value out of range; EptpError: no VM entry accepts the EPTP.
            NotBuilt: NPT of a hypervisor that is not in long mode; an EPTP that enables A and D where sptes have none, or the
                opposite; an EPT for fewer bits than physical addresses have.
        """
        if not self.kvm.nested:
            raise ValueError("vmrun: expected a machine with Kvm(nested=True)")
        row = self._ept_row(tables) if self.kvm.ept else self._npt_row(l1, tables)
        self._vmruns.add(self.registers(l2) | row << 32)
        return self.registers(l2) | row << 32

    def _npt_row(self, l1: Cpu, nested_cr3: int) -> int:
        tables = replace(l1, cr0=int(CR0.PE | CR0.PG), cr3=nested_cr3, cr4=l1.cr4 & ~int(CR4.PKE | CR4.PCIDE | CR4.PKS))
        if tables.mode not in (Mode.LONG4, Mode.LONG5):
            raise NotBuilt("nested tables of a hypervisor that is not in long mode")
        return self.registers(tables)

    def _ept_row(self, eptp: int) -> int:
        tables = Ept12(eptp, EptCaps(maxphyaddr=self._maxphyaddr, page_1g=self.kvm.page_1g))
        state = checked_eptp(eptp, tables.caps)
        if bool(state.accessed) != self.kvm.ad:  # the masks of sptes are the VM's, not a shadow page's
            raise NotBuilt(f"eptp {eptp:#x}: A and D in one of the EPT and the sptes that shadow it")
        if self._maxphyaddr > 12 + 9 * int(state.levels):
            raise NotBuilt(f"eptp {eptp:#x}: {int(state.levels)} levels for addresses of {self._maxphyaddr} bits")
        return self._add_row(tables)

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
        for name in ("dirty", "written", "report", "host_dirty"):
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

    def populate(self, tables: int = 1024) -> None:
        """Touch the words of the memslots, the first `tables` tables and their descriptors, and leave them as they are.

        A kernel's memory is there before it is used. Here the first touch of each 4 KiB is a page fault of the host, 2.3 us
        within a virtual machine: 8 % of a replay of 900,000 records that should be KVM's own time.
        """
        vm, used = self.vm, tables * TABLE_WORDS
        for words in (vm.slot_words[: self.slot_words_used], vm.spt[:used], vm.shadowed[:used], vm.desc[: 2 * used]):
            words[:: PAGE_SIZE // 8] |= np.uint64(0)
        vm.page["gfn"][:tables] |= np.uint64(0)

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
            ValueError: an event that cannot be replayed; MachineError: see there.
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
        for maximum in (Counter.MAX_MMU_RMAP_SIZE, Counter.MAX_MMU_PAGE_HASH_COLLISIONS):
            counters[maximum.name.lower()] = int(self.state.stat[:, maximum].max())
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

    def check(self, events: np.ndarray) -> None:
        """Refuse what compiled code would trust.

        Raises:
            ValueError: naming the event and what was expected.
        """
        check_events(events, self._limits(), self.slots, self._prepared)

    def _limits(self) -> Limits:
        return Limits(
            maxphyaddr=self._maxphyaddr,
            width=57 if any(cpu.mode == Mode.LONG5 for cpu in self.cpus) else 48,
            pcids=any(cpu.cr4 & int(CR4.PCIDE) for cpu in self.cpus),
            vcpus=self.vcpus,
            registers=np.array([isinstance(row, Cpu) for row in self._rows]),
            vmruns=np.array(sorted(self._vmruns), np.uint64),
            nested=self.kvm.nested,
            ept=self.kvm.ept,
        )

    def _follow_slots(self) -> None:
        """The memslots as the run left them."""
        active = self.vm.mem.slots
        active = active[active["start"] < active["end"]]
        rows = {int(dirty): row for row, dirty in enumerate(self._prepared["dirty"])}
        self.slots = {
            int(slot["id"]): MemslotInfo(int(slot["start"]), int(slot["end"]), int(slot["flags"]), rows[int(slot["dirty"])])
            for slot in active
        }


ERRORS = {
    Stop.NO_TABLES: "the machine's pool of tables is used up, expected a larger `tables`",
    Stop.NO_PAGES: "no shadow page is free under the limit: KVM_RUN fails with ENOSPC",
    Stop.NO_PROGRESS: "the access faults for ever: the guest makes no progress",
    Stop.TRIPLE_FAULT: "the guest's top page table lies outside every memslot: KVM shuts it down",
    Stop.DEVICE_FETCH: "an instruction fetched from a device: KVM cannot emulate it",
}
