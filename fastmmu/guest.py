"""The guest runs: entry into it, its accesses until they are done, and KVM's emulator for those that reach a device.

`access_bytes` is the loop in which an instruction faults, KVM handles the fault, and the instruction starts again.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import GPTE64, ONE, PAGE_MASK, PAGE_OFFSET, PAGE_SHIFT, PFERR, WORD_SHIFT, ZERO
from fastmmu.ept12 import note_exit, reflected_exit
from fastmmu.exits import leave
from fastmmu.fault import page_fault
from fastmmu.hardware import ADDRESS_32, access_gpa, not_plain, translate_page, walk_and_insert
from fastmmu.machine_state import Counter, LogKind, Outcome, Status, Stop, Touch, VcpuWord, VmWord
from fastmmu.memory import find_slot
from fastmmu.memslot import is_readonly, mark_dirty, note_write, slot_by_gfn
from fastmmu.mmio import cached_gpa, match, match_gpa
from fastmmu.permission import permission_fault
from fastmmu.pool import count
from fastmmu.roots import enter, stop
from fastmmu.shadow_fault import inject, walk_for_kvm
from fastmmu.state import NO_SLOT, Miss, Reg
from fastmmu.track import track_write
from fastmmu.unsync import is_write_tracked, refuses_write
from fastmmu.views import is_nested, is_shadow_paging, kvm_view
from fastmmu.walk import ALL_ONES, MODE_NONE, access_of, mode_of, page_gpa, read_entry, reserved_row, table_index

ATTEMPTS = 4096  # an instruction that faults so often without getting on never will: two dimensions of tables need 24
THREAD_ATTEMPTS = 64_000_000  # while other threads run: one that was put to sleep in the middle of a change is waited for
NO_FETCH = ZERO
BYTE_BITS, BYTES_MASK, WORD_BITS = np.uint64(3), np.uint64(7), np.uint64(64)
MMIO, MMIO_GENERATION, MMIO_END = int(VcpuWord.MMIO), int(VcpuWord.MMIO_GENERATION), int(VcpuWord.MMIO_GENERATION) + 1


@inner
def write_log(vm, log, kind, size, event, address, value):
    """Add a row to the log while there is room."""
    at = vm.word[VmWord.LOGGED]
    if at < np.uint64(len(log)):
        row = log[at]
        row["kind"], row["size"], row["event"], row["address"], row["value"] = kind, size, event, address, value
        vm.word[VmWord.LOGGED] = at + ONE


# --- accesses --------------------------------------------------------------------------------------------------------------


@inner
def stop_reason(outcome):
    """The Stop for an outcome that is an error, else END."""
    if outcome == Outcome.NO_TABLES:
        return Stop.NO_TABLES
    if outcome == Outcome.NO_PAGES:
        return Stop.NO_PAGES
    return Stop.END


@inner(inline=True)
def access_bytes(vm, vcpu, log, event, gva, size, access, missed, tried):
    """Do an access of `size` bytes, over a page boundary if need be, however often it faults.

    (DONE with the gpa, gpa of the second page or 0), or (FAULT, EMULATED, which is to be done, with the address that faulted, or
    STOP; 0). After each exit the instruction starts again: it is fetched, then its first page is translated, then its second.
    With PFERR.GUEST_FINAL in `access` the address is a gpa: the guest's own tables are not asked. With `missed` the TLB was asked
    for the first page already, and a plain walk `tried`.
    """
    physical = access & PFERR.GUEST_FINAL != ZERO
    second = (gva + size - ONE) & ~PAGE_OFFSET
    target, wanted, fetching, first = gva, access, False, not_plain()
    for _ in range(ATTEMPTS if vm.word[VmWord.THREADS] == ZERO else THREAD_ATTEMPTS):
        if not enter(vm, vcpu):
            return not_plain(), ZERO
        if missed:
            missed = False
            count(vcpu.stat, Counter.TLB_MISSES)
            touched = tried if tried.status == Status.EXIT else walk_and_insert(vm, vcpu, target, wanted)
        else:
            touched = access_gpa(vm, vcpu, gva, access) if physical else translate_page(vm, vcpu, target, wanted)
        if touched.status == Status.EXIT:
            if vm.word[VmWord.LOG_FAULTS] != ZERO:
                write_log(vm, log, LogKind.EXIT, 0, event, touched.address, touched.pferr)
            leave(vm, vcpu)
            note_exit(vcpu.nested, vcpu.own, touched.pferr)
            outcome = page_fault(vm, kvm_view(vcpu.nested, vcpu), touched.address, touched.pferr)
            if outcome == Outcome.EMULATE:
                if fetching:  # the instruction itself has become a device
                    stop(vm, Stop.DEVICE_FETCH, target, wanted)
                    return not_plain(), ZERO
                if not blocked(vm, touched.pferr):
                    return Touch(Status.EMULATED, ZERO, touched.address, touched.pferr), ZERO
            elif outcome == Outcome.INJECT and is_nested(vcpu.nested, vcpu.own):
                return reflected(vcpu, touched.address, touched.pferr), ZERO
            elif outcome == Outcome.INJECT:
                return Touch(Status.FAULT, ZERO, target, vcpu.own[VcpuWord.INJECTED]), ZERO
            elif outcome >= Outcome.NO_TABLES:
                stop(vm, stop_reason(outcome), touched.address, touched.pferr)
                return not_plain(), ZERO
            target, wanted, fetching = gva, access, False
            if not physical and vcpu.own[VcpuWord.FETCH_ACCESS] != NO_FETCH:
                target, wanted = vcpu.own[VcpuWord.FETCHED], vcpu.own[VcpuWord.FETCH_ACCESS]
                fetching = target != gva or wanted != access
        elif fetching:
            target, wanted, fetching = gva, access, False
        elif touched.status != Status.DONE or second == gva & ~PAGE_OFFSET:
            return touched, ZERO
        elif target == second:
            return first, touched.gpa
        else:
            target, first = second, touched
    stop(vm, Stop.NO_PROGRESS, gva, access)
    return not_plain(), ZERO


@inner
def reflected(vcpu, address, pferr):
    """A nested guest's fault goes to its hypervisor: the rights are those of the walk of its tables, whether the address was a
    final one or of an entry is the processor's word. The gpa's place has the reason."""
    reason, code = reflected_exit(vcpu.nested, vcpu.own, pferr)
    return Touch(Status.REFLECTED, reason, address, code)


@inner
def blocked(vm, pferr):
    """A write to a guest table that KVM will not map writable is neither emulated nor mapped: it only enters again (5.3.3)."""
    table_write = PFERR.P | PFERR.W | PFERR.GUEST_PAGE
    return vm.word[VmWord.TDP] != ZERO and pferr & table_write == table_write


# --- data ------------------------------------------------------------------------------------------------------------------


@inner
def mask_of(size):
    """Mask of the low `size` bytes, 1 to 8."""
    return ~ZERO >> (WORD_BITS - (size << BYTE_BITS))


@inner
def read_memory(words, gpa, size):
    """`size` bytes, 1 to 8, within one page of memory."""
    index, shift = gpa >> WORD_SHIFT, (gpa & BYTES_MASK) << BYTE_BITS
    value = words[index] >> shift
    if shift + (size << BYTE_BITS) > WORD_BITS:
        value |= words[index + ONE] << (WORD_BITS - shift)
    return value & mask_of(size)


@inner
def write_memory(words, gpa, size, value):
    """Store `size` bytes, 1 to 8, within one page of memory."""
    index, shift = gpa >> WORD_SHIFT, (gpa & BYTES_MASK) << BYTE_BITS
    mask = mask_of(size)
    words[index] = (words[index] & ~(mask << shift)) | ((value & mask) << shift)
    if shift + (size << BYTE_BITS) > WORD_BITS:
        back = WORD_BITS - shift
        words[index + ONE] = (words[index + ONE] & ~(mask >> back)) | ((value & mask) >> back)


@inner
def bytes_to_page_end(gva, size):
    """How many of `size` bytes at `gva` lie in its page."""
    left = (PAGE_OFFSET & ~gva) + ONE
    return min(left, size)


@inner
def read_guest(vm, gva, size, gpa, second):
    """What a load delivers, from one page or two."""
    part = bytes_to_page_end(gva, size)
    value = read_memory(vm.mem.words, gpa, part)
    if part < size:
        value |= read_memory(vm.mem.words, second, size - part) << (part << BYTE_BITS)
    return value


@inner
def write_guest(vm, vcpu, gva, size, gpa, second, value):
    """A store, to one page or two."""
    part = bytes_to_page_end(gva, size)
    write_memory(vm.mem.words, gpa, part, value)
    note_write(vm, vcpu, gpa)
    if part < size:
        write_memory(vm.mem.words, second, size - part, value >> (part << BYTE_BITS))
        note_write(vm, vcpu, second)


# --- emulation -------------------------------------------------------------------------------------------------------------


@inner
def is_device(vm, vcpu, gpa, write):
    """Whether an access goes to user space: no memslot, or a write to a read-only one."""
    number = slot_by_gfn(vm, vcpu, gpa >> PAGE_SHIFT)
    return number == NO_SLOT or (write and is_readonly(vm.mem.slots[number]))


@inner
def final_place(vm, vcpu, view, gpa, access):
    """Touch of the address that L2's tables give: where the tables that L1 gave L2 say that it is."""
    held = walk_for_kvm(vm, view, gpa, access | PFERR.U)
    if held.ok:
        return Touch(Status.DONE, held.gpa, ZERO, ZERO)
    inject(vm, view, gpa, held.pferr)
    return reflected(vcpu, gpa, PFERR.GUEST_FINAL)


@inner
def walk_nested(vm, vcpu, gva, access):
    """The emulator's Touch of a page of a nested guest: L2's tables, each address in them by the tables that L1 gave L2.

    A and D of L2's tables were set by the processor, whose walk ended in the fault that is emulated.
    """
    mmu, view = vcpu.mmu, kvm_view(vcpu.nested, vcpu)
    if mmu.reg[Reg.MODE] == MODE_NONE:
        return final_place(vm, vcpu, view, gva & ADDRESS_32, access)
    mode = mode_of(mmu)
    table, level, rights = mmu.reg[Reg.CR3] & mode.root, mode.levels, ALL_ONES
    while True:
        index = table_index(gva, level, mode.index_bits)
        entry = table + index * (ONE << (PAGE_SHIFT - mode.index_bits))
        held = walk_for_kvm(vm, view, entry, PFERR.U | PFERR.W)
        if not held.ok:
            inject(vm, view, entry, held.pferr)
            return reflected(vcpu, entry, PFERR.GUEST_FINAL)
        if find_slot(vm.mem.slots, held.gpa) == NO_SLOT:
            return Touch(Status.FAULT, ZERO, gva, access)
        gpte = read_entry(vm.mem, mode, held.gpa & PAGE_MASK, index)
        large = gpte & mmu.reg[Reg.LARGE]
        if gpte & GPTE64.P == ZERO:
            return Touch(Status.FAULT, ZERO, gva, access)
        if gpte & mmu.reserved[reserved_row(large, level)] != ZERO:
            return Touch(Status.FAULT, ZERO, gva, access | PFERR.P | PFERR.RSVD)
        rights &= gpte ^ GPTE64.NX
        if level == ONE or large != ZERO:
            break
        table = gpte & mode.root
        level -= ONE
    if permission_fault(mmu, access_of(rights), access):
        return Touch(Status.FAULT, ZERO, gva, access | PFERR.P)
    return final_place(vm, vcpu, view, page_gpa(mode, gpte, gva, level), access)


@inner(inline=True)
def emulated_gpa(vm, vcpu, gva, access, faulted, locked):
    """(Touch of a page as the emulator finds it, whether KVM remembers it as a device's): the gpa that faulted where the offset is
    the same, or by the MMIO info cache, else by a walk (facts 4.3). The store of a locked exchange walks first: to memory it goes
    by what the tables say now."""
    if is_nested(vcpu.nested, vcpu.own):
        return walk_nested(vm, vcpu, gva, access), False
    direct = not is_shadow_paging(vm, vcpu)
    if direct and gva & PAGE_OFFSET == faulted & PAGE_OFFSET:
        return Touch(Status.DONE, faulted, ZERO, ZERO), False
    if vcpu.mmu.reg[Reg.MODE] == MODE_NONE:
        return Touch(Status.DONE, gva & ADDRESS_32, ZERO, ZERO), False
    entry, generation = vcpu.own[MMIO:MMIO_GENERATION], vcpu.own[MMIO_GENERATION:MMIO_END]
    if locked and not direct:
        walk = walk_for_kvm(vm, vcpu, gva, access)
        if walk.ok and not is_device(vm, vcpu, walk.gpa, True):
            return Touch(Status.DONE, walk.gpa, ZERO, ZERO), False
    if not direct and vm.word[VmWord.MMIO_INFO] != ZERO:
        if match(entry, None, generation, vcpu.mmu, gva, access) == Miss.HIT:
            return Touch(Status.DONE, cached_gpa(entry, gva), ZERO, ZERO), True
    walk = walk_for_kvm(vm, vcpu, gva, access)
    if walk.ok:
        remembered = not direct and vm.word[VmWord.MMIO_INFO] != ZERO and match_gpa(entry, generation, vcpu.mmu, walk.gpa)
        return Touch(Status.DONE, walk.gpa, ZERO, ZERO), remembered
    inject(vm, vcpu, gva, walk.pferr)
    return Touch(Status.FAULT, ZERO, gva, walk.pferr), False


@inner
def supplied(vm, supply, size):
    """Data that user space supplies for a device read."""
    at = vm.word[VmWord.SUPPLIED]
    vm.word[VmWord.SUPPLIED] = at + ONE
    return supply[at] & mask_of(size) if at < np.uint64(len(supply)) else ZERO


@inner(inline=True)
def emulate_memory(vm, vcpu, gpa, size, write, known, value):
    """One page of an emulated access that memory answers: the value read. What is not known is not written."""
    if not write:
        return read_memory(vm.mem.words, gpa, size)
    if known:
        write_memory(vm.mem.words, gpa, size, value)
    after_emulated_write(vm, vcpu, gpa, size)
    return ZERO


@inner(inline=True)
def after_emulated_write(vm, vcpu, gpa, size):
    """KVM wrote to the guest's memory for the guest: it is logged, and shadow pages of what was written are told."""
    number = slot_by_gfn(vm, vcpu, gpa >> PAGE_SHIFT)
    mark_dirty(vm, vm.mem.slots[number], gpa >> PAGE_SHIFT)
    note_write(vm, vcpu, gpa)
    track_write(vm, vcpu, gpa, size)


@inner
def emulate_device(vm, log, supply, event, gpa, size, write, value):
    """One page of an emulated access that user space answers: the value read."""
    data = value & mask_of(size) if write else supplied(vm, supply, size)
    write_log(vm, log, LogKind.MMIO_WRITE if write else LogKind.MMIO_READ, size, event, gpa, data)
    return data


@inner(inline=True)
def emulate(vm, vcpu, log, supply, event, gva, size, access, faulted, known, value, locked):
    """KVM's emulator does the access (facts 4.3): (Touch, value read). Memory is accessed page by page, as it is found; user space
    is asked when both pages are known.

    A write whose data are not `known` leaves memory as it is; its `size` may be more than 8 bytes, but it ends with its page.
    """
    count(vcpu.stat, Counter.INSN_EMULATION)
    write = access & PFERR.W != ZERO
    part = bytes_to_page_end(gva, size)
    shift, asked = part << BYTE_BITS, part if known else ONE
    address, length, data = gva, part, ZERO
    first, second, first_device, second_device = ZERO, ZERO, False, False
    while True:
        touched, remembered = emulated_gpa(vm, vcpu, address, access, faulted, locked and part == size)
        if touched.status != Status.DONE:
            return touched, ZERO
        device = remembered or is_device(vm, vcpu, touched.gpa, write)
        if not device:
            answer = emulate_memory(vm, vcpu, touched.gpa, length, write, known, value >> shift if address != gva else value)
            data |= answer << shift if address != gva else answer
        if address == gva:
            first, first_device = touched.gpa, device
        else:
            second, second_device = touched.gpa, device
        if address != gva or part == size or not known:
            break
        address, length = gva + part, size - part
    if first_device:
        data |= emulate_device(vm, log, supply, event, first, asked, write, value)
    if second_device:
        data |= emulate_device(vm, log, supply, event, second, length, write, value >> shift) << shift
    if first_device or second_device:
        count(vcpu.stat, Counter.MMIO_EXITS)
    return Touch(Status.EMULATED, first, ZERO, ZERO), data


@inner
def store_unseen(vm, vcpu, gpa, value):
    """A store of 8 bytes to a page table by a gva that is not known, under shadow paging: as if by one that the guest has in use.

    Where an upper table lies that is shadowed, KVM emulates the store. Where a leaf table lies whose pages are in step it faults
    once, and they are not any more. Else the processor does it, and KVM sees nothing.
    """
    gfn = gpa >> PAGE_SHIFT
    number = slot_by_gfn(vm, vcpu, gfn)
    if number == NO_SLOT or is_readonly(vm.mem.slots[number]):
        return
    slot = vm.mem.slots[number]
    write_memory(vm.mem.words, gpa, np.uint64(8), value)
    if is_write_tracked(vm, slot, gfn):
        leave(vm, vcpu)
        count(vcpu.stat, Counter.PF_TAKEN)
        count(vcpu.stat, Counter.PF_EMULATE)
        count(vcpu.stat, Counter.INSN_EMULATION)
        after_emulated_write(vm, vcpu, gpa, np.uint64(8))
        return
    before = vcpu.stat[Counter.MMU_UNSYNC]
    refuses_write(vm, vcpu.stat, slot, gfn, True, False)
    if vcpu.stat[Counter.MMU_UNSYNC] != before:
        leave(vm, vcpu)
        count(vcpu.stat, Counter.PF_TAKEN)
        count(vcpu.stat, Counter.PF_FIXED)
    mark_dirty(vm, slot, gfn)
    note_write(vm, vcpu, gpa)
