"""The guest runs: entry into it, its accesses until they are done, and KVM's emulator for those that reach a device.

`access_page` is the loop in which an instruction faults, KVM handles the fault, and the instruction starts again.
"""

from __future__ import annotations

import numpy as np

from fastmmu import machine_state
from fastmmu._jit import inner
from fastmmu.bits import GPTE64, ONE, PAGE_OFFSET, PAGE_SHIFT, PFERR, WORD_SHIFT, ZERO
from fastmmu.fault import page_fault
from fastmmu.hardware import ADDRESS_32, PAE_LEVEL, access_gpa, leave, translate_page
from fastmmu.machine_state import Counter, LogKind, Outcome, Request, Status, Stop, Touch, VcpuWord, VmWord
from fastmmu.memslot import is_readonly, mark_dirty, note_write, slot_by_gfn
from fastmmu.shadow import count, flush_remote, get_shadow_page, is_obsolete, is_short_of_pages, make_pages_available, put_root
from fastmmu.state import NO_SLOT, Mmio, Reg
from fastmmu.tdp import get_root
from fastmmu.tdp import put_root as put_tdp_root
from fastmmu.tlb import flush
from fastmmu.walk import MODE_NONE, mode_of, walk_exact

TLB_FLUSH, FREE_OBSOLETE_ROOTS, LOAD_ROOT, FLUSH_CURRENT = (np.uint64(one) for one in Request)
ATTEMPTS = 4096  # an instruction that faults so often without getting on never will: 2 x 24 tables are the most it can need
REQUESTS = np.uint64(machine_state.REQUESTS)
PAE_ROOTS = 4
PAE_ROOT_SHIFT = np.uint64(18)
NO_FETCH = ZERO
BYTE_BITS, BYTES_MASK, WORD_BITS = np.uint64(3), np.uint64(7), np.uint64(64)


@inner
def stop(vm, reason, address, code):
    """End the replay."""
    vm.word[VmWord.STOP] = np.uint64(reason)
    vm.word[VmWord.STOP_ADDRESS], vm.word[VmWord.STOP_CODE] = address, code


@inner
def write_log(vm, log, kind, size, event, address, value):
    """Add a row to the log while there is room."""
    at = vm.word[VmWord.LOGGED]
    if at < np.uint64(len(log)):
        row = log[at]
        row["kind"], row["size"], row["event"], row["address"], row["value"] = kind, size, event, address, value
        vm.word[VmWord.LOGGED] = at + ONE


# --- roots and requests ----------------------------------------------------------------------------------------------------


@inner
def load_root(vm, vcpu):
    """Find or make the root that the processor walks, and flush what its TLB has for another one. False when that is the end."""
    if vm.word[VmWord.TDP] == ZERO and vcpu.mmu.reg[Reg.MODE] != MODE_NONE:
        stop(vm, Stop.SHADOW_PAGING, ZERO, ZERO)
        return False
    if vm.word[VmWord.TDP_MMU] != ZERO:
        root = get_root(vm)
    elif is_short_of_pages(vm.word) and not make_pages_available(vm, vcpu.stat):
        stop(vm, Stop.NO_PAGES, ZERO, ZERO)
        return False
    elif vm.word[VmWord.ROOT_LEVEL] != PAE_LEVEL:
        root = get_shadow_page(vm, vcpu.stat, ZERO, vm.word[VmWord.ROOT_LEVEL])
        vm.page[root]["roots"] += np.uint32(root != ZERO)
    else:
        root = load_pae_roots(vm, vcpu)
    if root == ZERO:
        stop(vm, Stop.NO_TABLES, ZERO, ZERO)
        return False
    vcpu.own[VcpuWord.ROOT] = root
    flush(vcpu.tlb)
    return True


@inner
def load_pae_roots(vm, vcpu):
    """Four roots of 1 GiB each, which 1 stands for; ZERO without a table."""
    for i in range(PAE_ROOTS):
        table = get_shadow_page(vm, vcpu.stat, np.uint64(i) << PAE_ROOT_SHIFT, PAE_LEVEL)
        if table == ZERO:
            return ZERO
        vm.page[table]["roots"] += np.uint32(1)
        vcpu.own[VcpuWord.PAE_ROOT + i] = table
    return ONE


@inner
def unload_root(vm, vcpu):
    """Let go of the root; the MMIO info cache forgets its gva (facts 4.5)."""
    root = vcpu.own[VcpuWord.ROOT]
    vm.word[REQUESTS + vcpu.own[VcpuWord.NUMBER]] |= LOAD_ROOT
    vcpu.own[VcpuWord.MMIO + Mmio.GVA] = ZERO
    if root == ZERO:
        return
    vcpu.own[VcpuWord.ROOT] = ZERO
    if vm.word[VmWord.TDP_MMU] != ZERO:
        put_tdp_root(vm, vcpu.stat, root)
        return
    freed = False
    if vm.word[VmWord.ROOT_LEVEL] != PAE_LEVEL:
        freed = put_root(vm, vcpu.stat, root)
    else:
        for i in range(PAE_ROOTS):
            freed |= put_root(vm, vcpu.stat, vcpu.own[VcpuWord.PAE_ROOT + i])
    if freed:
        flush_remote(vm.word, vcpu.stat)


@inner
def free_obsolete_root(vm, vcpu):
    """Let go of a root that was zapped; PAE roots always (facts 5.14)."""
    root = vcpu.own[VcpuWord.ROOT]
    if root != ZERO and (vm.word[VmWord.ROOT_LEVEL] == PAE_LEVEL or is_obsolete(vm, root)):
        unload_root(vm, vcpu)


@inner
def is_asked(vm, vcpu):
    """Whether there are requests to the vCPU."""
    return vm.word[REQUESTS + vcpu.own[VcpuWord.NUMBER]] != ZERO


@inner
def enter(vm, vcpu):
    """Serve what was asked of the vCPU, also what serving it asks for, and enter the guest. False when that is the end."""
    number = REQUESTS + vcpu.own[VcpuWord.NUMBER]
    while vm.word[number] != ZERO:
        if vm.word[number] & FREE_OBSOLETE_ROOTS != ZERO:
            free_obsolete_root(vm, vcpu)
        requests = vm.word[number]
        vm.word[number] = ZERO
        if requests & (TLB_FLUSH | FLUSH_CURRENT) != ZERO:
            count(vcpu.stat, Counter.TLB_FLUSH)
            flush(vcpu.tlb)
        if vcpu.own[VcpuWord.ROOT] == ZERO and not load_root(vm, vcpu):
            vm.word[number] |= LOAD_ROOT  # whoever tries again comes here again
            return False
    return True


# --- accesses --------------------------------------------------------------------------------------------------------------


@inner
def stop_reason(outcome):
    """The Stop for an outcome that is an error, else END."""
    if outcome == Outcome.NO_TABLES:
        return Stop.NO_TABLES
    if outcome == Outcome.NO_PAGES:
        return Stop.NO_PAGES
    return Stop.END


@inner
def access_page(vm, vcpu, log, event, gva, access):
    """Do an access within one page, however often it faults: DONE with the gpa, FAULT, EMULATED (to be done) with the gpa that
    faulted, or STOP. With PFERR.GUEST_FINAL in `access` the address is a gpa: the guest's own tables are not asked."""
    physical = access & PFERR.GUEST_FINAL != ZERO
    target, wanted = gva, access
    for _ in range(ATTEMPTS):
        if is_asked(vm, vcpu) and not enter(vm, vcpu):
            return Touch(Status.STOP, ZERO, ZERO, ZERO)
        touched = access_gpa(vm, vcpu, gva, access) if physical else translate_page(vm, vcpu, target, wanted)
        if touched.status == Status.EXIT:
            if vm.word[VmWord.LOG_FAULTS] != ZERO:
                write_log(vm, log, LogKind.EXIT, 0, event, touched.address, touched.pferr)
            leave(vm, vcpu)
            outcome = page_fault(vm, vcpu, touched.address, touched.pferr)
            if outcome == Outcome.EMULATE:
                if target != gva or wanted != access:  # the instruction itself has become a device
                    stop(vm, Stop.DEVICE_FETCH, target, wanted)
                    return Touch(Status.STOP, ZERO, ZERO, ZERO)
                if not blocked(vm, touched.pferr):
                    return Touch(Status.EMULATED, ZERO, touched.address, touched.pferr)
            elif outcome >= Outcome.NO_TABLES:
                stop(vm, stop_reason(outcome), touched.address, touched.pferr)
                return Touch(Status.STOP, ZERO, ZERO, ZERO)
            target, wanted = gva, access
            if not physical and vcpu.own[VcpuWord.FETCH_ACCESS] != NO_FETCH:  # the instruction starts again: it is fetched first
                target, wanted = vcpu.own[VcpuWord.FETCHED], vcpu.own[VcpuWord.FETCH_ACCESS]
        elif target != gva or wanted != access:
            target, wanted = gva, access
        else:
            return touched
    stop(vm, Stop.NO_PROGRESS, gva, access)
    return Touch(Status.STOP, ZERO, ZERO, ZERO)


@inner
def blocked(vm, pferr):
    """A write to a guest table that KVM will not map writable is neither emulated nor mapped: it only enters again (5.3.3)."""
    table_write = PFERR.P | PFERR.W | PFERR.GUEST_PAGE
    return vm.word[VmWord.TDP] != ZERO and pferr & table_write == table_write


@inner
def access_bytes(vm, vcpu, log, event, gva, size, access):
    """An access of `size` bytes, over a page boundary if need be: (Touch of the first page, gpa of the second or 0)."""
    first = access_page(vm, vcpu, log, event, gva, access)
    end = gva + size - ONE
    if first.status != Status.DONE or end >> PAGE_SHIFT == gva >> PAGE_SHIFT:
        return first, ZERO
    second = access_page(vm, vcpu, log, event, end & ~PAGE_OFFSET, access)
    if second.status != Status.DONE:
        return second, ZERO
    return first, second.gpa


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
def log_guest_bits(vm, vcpu, gva, leaf_level, write):
    """The emulator's walk set A and D in entries that lacked them: their tables were written (facts 1.6.6)."""
    mode = mode_of(vcpu.mmu)
    table, level = vcpu.mmu.reg[Reg.CR3] & mode.root, mode.levels
    while True:
        gpte = vcpu.trail[level]
        wanted = GPTE64.A | (GPTE64.D if level == leaf_level and write else ZERO)
        number = slot_by_gfn(vm, vcpu, table >> PAGE_SHIFT)
        if gpte & wanted != wanted and number != NO_SLOT and not is_readonly(vm.mem.slots[number]):
            mark_dirty(vm, vm.mem.slots[number], table >> PAGE_SHIFT)
            note_write(vm, vcpu, table)
        if level == leaf_level:
            return
        table = gpte & mode.root
        level -= ONE


@inner
def emulated_gpa(vm, vcpu, gva, access, faulted):
    """(Touch) of one page as the emulator finds it: the gpa that faulted where the offset is the same, else by a walk."""
    if gva & PAGE_OFFSET == faulted & PAGE_OFFSET:
        return Touch(Status.DONE, faulted, ZERO, ZERO)
    if vcpu.mmu.reg[Reg.MODE] == MODE_NONE:
        return Touch(Status.DONE, gva & ADDRESS_32, ZERO, ZERO)
    walk = walk_exact(vm.mem, vcpu.mmu, vcpu.trail, gva, access)
    if walk.ok:
        log_guest_bits(vm, vcpu, gva, walk.level, access & PFERR.W != ZERO)
        return Touch(Status.DONE, walk.gpa, ZERO, ZERO)
    count(vcpu.stat, Counter.PF_GUEST)
    return Touch(Status.FAULT, ZERO, gva, walk.pferr)


@inner
def supplied(vm, supply, size):
    """Data that user space supplies for a device read."""
    at = vm.word[VmWord.SUPPLIED]
    vm.word[VmWord.SUPPLIED] = at + ONE
    return supply[at] & mask_of(size) if at < np.uint64(len(supply)) else ZERO


@inner
def is_device(vm, vcpu, gpa, write):
    """Whether an access goes to user space: no memslot, or a write to a read-only one."""
    number = slot_by_gfn(vm, vcpu, gpa >> PAGE_SHIFT)
    return number == NO_SLOT or (write and is_readonly(vm.mem.slots[number]))


@inner
def emulate_memory(vm, vcpu, gpa, size, write, value):
    """One page of an emulated access that memory answers: the value read."""
    if not write:
        return read_memory(vm.mem.words, gpa, size)
    number = slot_by_gfn(vm, vcpu, gpa >> PAGE_SHIFT)
    write_memory(vm.mem.words, gpa, size, value)
    mark_dirty(vm, vm.mem.slots[number], gpa >> PAGE_SHIFT)
    note_write(vm, vcpu, gpa)
    return ZERO


@inner
def emulate_device(vm, log, supply, event, gpa, size, write, value):
    """One page of an emulated access that user space answers: the value read."""
    data = value & mask_of(size) if write else supplied(vm, supply, size)
    write_log(vm, log, LogKind.MMIO_WRITE if write else LogKind.MMIO_READ, size, event, gpa, data)
    return data


@inner
def emulate(vm, vcpu, log, supply, event, gva, size, access, faulted, value):
    """KVM's emulator does the access (facts 4.3): (Touch, value read). Memory is accessed page by page, as it is found; user space
    is asked when both pages are known."""
    if access & PFERR.F != ZERO:
        stop(vm, Stop.DEVICE_FETCH, gva, access)
        return Touch(Status.STOP, ZERO, gva, ZERO), ZERO
    count(vcpu.stat, Counter.INSN_EMULATION)
    write = access & PFERR.W != ZERO
    part = bytes_to_page_end(gva, size)
    shift = part << BYTE_BITS
    data, rest = ZERO, ZERO
    first = emulated_gpa(vm, vcpu, gva, access, faulted)
    if first.status != Status.DONE:
        return first, ZERO
    device = is_device(vm, vcpu, first.gpa, write)
    if not device:
        data = emulate_memory(vm, vcpu, first.gpa, part, write, value)
    second, second_device = first, False
    if part < size:
        second = emulated_gpa(vm, vcpu, gva + part, access, faulted)
        if second.status != Status.DONE:
            return second, ZERO
        second_device = is_device(vm, vcpu, second.gpa, write)
        if not second_device:
            rest = emulate_memory(vm, vcpu, second.gpa, size - part, write, value >> shift)
    if device:
        data = emulate_device(vm, log, supply, event, first.gpa, part, write, value)
    if second_device:
        rest = emulate_device(vm, log, supply, event, second.gpa, size - part, write, value >> shift)
    if part < size:
        data |= rest << shift
    if device or second_device:
        count(vcpu.stat, Counter.MMIO_EXITS)
    return Touch(Status.EMULATED, first.gpa, ZERO, ZERO), data
