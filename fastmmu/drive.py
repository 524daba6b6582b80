"""The kernel that replays events on a virtual machine: what the guest does, and what user space does to it."""

from __future__ import annotations

import numpy as np

from fastmmu import dirty_log, host
from fastmmu._jit import inner, kernel, load
from fastmmu.bits import CR0, CR4, GPTE64, ONE, PAGE_OFFSET, PFERR, WORD_SHIFT, ZERO
from fastmmu.bits import CR3 as CR3_BITS
from fastmmu.events import Op
from fastmmu.exits import ask_one, is_asked, leave, request_word
from fastmmu.guest import (
    access_bytes,
    emulate,
    read_guest,
    store_unseen,
    write_guest,
    write_log,
    write_memory,
)
from fastmmu.hardware import look_ahead, not_plain, walk_plainly
from fastmmu.machine_state import PREVIOUS_ROOTS, Counter, LogKind, Status, Stop, Touch, VcpuWord, VmWord
from fastmmu.memslot import note_write, slot_by_id
from fastmmu.nested_guest import end_nested, invalidate_ept, load_row, run_nested
from fastmmu.pool import NO_TABLE, count
from fastmmu.roots import (
    FLUSH_GUEST,
    change_registers,
    enter,
    load_pdptes,
    set_cr3,
    set_role,
    stop,
    unload_roots,
)
from fastmmu.shadow import set_page_limit
from fastmmu.state import NO_SLOT, Reg
from fastmmu.sync import invalidate_current, invalidate_under
from fastmmu.tlb import flush, invalidate, lookup
from fastmmu.views import is_nested, is_shadow_paging, vcpu_of
from fastmmu.walk import ALL_ONES, MODE_PAE

(
    ACCESS, DEVICE, STORE, CR3, INVLPG, FLUSH, GENERATION, LOAD, WRITE, EXCHANGE, OPERAND, VCPU, EXIT, MODE, REGISTERS, SLOT_CREATE,
    SLOT_DELETE, SLOT_FLAGS, DIRTY_GET, DIRTY_CLEAR, UNMAP, PAGE_LIMIT, PARAMETER, AGE, VMRUN, VMEXIT,
    INVEPT,
) = (np.uint8(op) for op in Op)  # fmt: skip
LOG_MARGIN = np.uint64(256)  # rows that one event may need
WORD_BYTES, BYTE_BITS = np.uint64(8), np.uint64(3)
W, F = np.uint8(PFERR.W), np.uint8(PFERR.F)
NO = np.uint8(0)
NOT_FETCHED = -1
AHEAD = np.uint64(6)  # accesses
CR0_ON, CR0_FREE = CR0.PG | CR0.WP, CR0.TS | CR0.MP


@inner
def is_own_store(row, behind):
    """Whether the STORE behind a recorded write is that write: it tells what was stored."""
    if behind["op"] != STORE or row["checked"] == NO or row["access"] & W == NO:
        return False
    return row["value"] >> WORD_SHIFT == behind["address"] >> WORD_SHIFT


@inner(inline=True)
def finish(vm, vcpu, log, supply, event, row, compared, known, stored, touched, second):
    """What an access does when its addresses are found, or when KVM is to emulate it: its Touch.

    `second` is the gpa of its second page. Of an ACCESS the data are `stored` if they are `known`.
    """
    op, gva, size, value, access = row["op"], row["address"], np.uint64(row["size"]), row["value"], np.uint64(row["access"])
    if touched.status == Status.DONE:
        if op == STORE:
            write_guest(vm, vcpu, gva, WORD_BYTES, touched.gpa, ZERO, value)
        elif op <= DEVICE:
            if access & PFERR.W != ZERO:
                note_write(vm, vcpu, touched.gpa)
        else:
            transfer(vm, vcpu, log, event, row, compared, touched.gpa, second)
        return touched
    if touched.status != Status.EMULATED or op == STORE:  # a STORE to a device or to read-only memory is lost
        return touched
    if access & PFERR.F != ZERO:
        stop(vm, Stop.DEVICE_FETCH, gva, access)
        return Touch(Status.STOP, ZERO, gva, ZERO)
    if op <= DEVICE:
        size, value = max(size, ONE), stored
        known = known or access & PFERR.W == ZERO
        size = min(size, WORD_BYTES - (gva & (WORD_BYTES - ONE))) if known else size
    else:
        known = True
    return emulate_row(vm, vcpu, log, supply, event, op, gva, size, access, touched.address, known, value, compared)


@inner
def transfer(vm, vcpu, log, event, row, compared, gpa, second):
    """A LOAD, WRITE or EXCHANGE of memory that the processor does itself."""
    op, gva, size, value = row["op"], row["address"], np.uint64(row["size"]), row["value"]
    if op != WRITE:
        seen = read_guest(vm, gva, size, gpa, second)
        write_log(vm, log, LogKind.LOADED, row["size"], event, gva, seen)
        if seen != compared:
            value = seen  # an exchange that fails writes back what it saw
    if op != LOAD:
        write_guest(vm, vcpu, gva, size, gpa, second, value)


@inner(inline=True)
def emulate_row(vm, vcpu, log, supply, event, op, gva, size, access, faulted, known, value, compared):
    """An access by KVM's emulator; an EXCHANGE first reads, then writes, as one instruction."""
    reads, writes = op in (LOAD, EXCHANGE), op == EXCHANGE
    while True:
        one = access & ~PFERR.W if reads else access
        touched, seen = emulate(vm, vcpu, log, supply, event, gva, size, one, faulted, known, value, writes and not reads)
        if touched.status == Status.FAULT and reads and writes:
            return Touch(touched.status, ZERO, touched.address, touched.pferr | PFERR.W)  # what it reads it would write
        if touched.status != Status.EMULATED:
            return touched
        if not (reads and writes):
            break
        value, compared = (value if seen == compared else seen), seen
        reads = False
        vcpu.stat[Counter.INSN_EMULATION] -= 1
    if op in (LOAD, EXCHANGE):
        write_log(vm, log, LogKind.LOADED, np.uint8(size), event, gva, compared if writes else seen)
    return touched


@inner
def access_of_row(op, row):
    """(address, size, access) of what a row touches; a STORE names a gpa."""
    if op == STORE:
        return row["address"], WORD_BYTES, PFERR.W | PFERR.GUEST_FINAL
    return row["address"], (np.uint64(row["size"]) if op > DEVICE else ONE), np.uint64(row["access"])


@inner(inline=True)
def run_plainly(vm, vcpu, events, first, fetched):
    """Replay accesses from event `first` on, as long as each is plain: the TLB serves it, or a walk that only fills the TLB.

    Returns (index of the event that is not, or their number; the last fetch before it; how it ended): DONE for one that is plain,
    but not what was recorded, EXIT for an exit, STOP for anything else. A loop of its own: one with all that `drive` does in it
    leaves no registers to this, 5.8 against 6.7 ns per record of a boot that causes no exit.
    """
    asked, logs = request_word(vcpu), vm.word[VmWord.LOGGING_SLOTS] != ZERO
    last, shadowed = np.uint64(len(events) - 1), vm.word[VmWord.TDP] == ZERO
    for number in range(np.uint64(first), np.uint64(len(events))):
        row, i = events[number], np.int64(number)
        if row["op"] > DEVICE or load(vm.word, asked) != ZERO:
            return i, fetched, not_plain()
        fetched = i if row["access"] & F != NO else fetched
        if shadowed:
            look_ahead(vm, vcpu, events[min(number + AHEAD, last)]["address"])
        gva, access = row["address"], np.uint64(row["access"])
        entry = lookup(vcpu.tlb, vcpu.mmu, gva, access)
        if entry != ZERO:
            count(vcpu.stat, Counter.TLB_HITS)
            gpa = (entry & GPTE64.ADDR) | (gva & PAGE_OFFSET)
        else:
            touched = walk_plainly(vm, vcpu, gva, access)
            if touched.status != Status.DONE:
                return i, fetched, touched
            count(vcpu.stat, Counter.TLB_MISSES)
            gpa = touched.gpa
        if logs and access & PFERR.W != ZERO:
            note_write(vm, vcpu, gpa)
        if row["checked"] != NO and gpa != row["value"]:
            return i, fetched, Touch(Status.DONE, gpa, ZERO, ZERO)
    return len(events), fetched, not_plain()


@inner
def note_fetch(vcpu, events, fetched):
    """Keep the last fetch, event `fetched` unless it is NOT_FETCHED, with the vCPU: an instruction that exits is fetched again."""
    if fetched != NOT_FETCHED:
        vcpu.own[VcpuWord.FETCHED] = events[fetched]["address"]
        vcpu.own[VcpuWord.FETCH_ACCESS] = np.uint64(events[fetched]["access"])


@inner(inline=True)
def after_access(vm, vcpu, log, event, row, touched):
    """Log what an access came to; False when the replay ends with it."""
    if touched.status == Status.STOP:
        return False
    if touched.status == Status.FAULT:
        vcpu.own[VcpuWord.FETCH_ACCESS] = ZERO  # what follows, the delivery of the fault, is no instruction that was fetched
        write_log(vm, log, LogKind.PAGE_FAULT, 0, event, touched.address, touched.pferr)
        if vm.word[VmWord.STOP_AT_FAULT] != ZERO:
            stop(vm, Stop.GUEST_FAULT, touched.address, touched.pferr)
            return False
        if row["checked"] != NO:
            stop(vm, Stop.DIFFERS, ALL_ONES, touched.pferr)
            return False
        return True
    if vm.word[VmWord.LOG_ACCESSES] != ZERO:
        write_log(vm, log, LogKind.ACCESSED, 0, event, row["address"], touched.gpa)
    if row["checked"] != NO and touched.gpa != row["value"]:
        stop(vm, Stop.DIFFERS, touched.gpa, ZERO)
        return False
    return True


@inner(inline=True)
def load_cr3(vm, vcpu, log, event, value):
    """MOV to CR3. With two-dimensional paging KVM does not see it, and the TLB, which knows no PCIDs, is flushed."""
    if vm.word[VmWord.TDP] != ZERO:
        has_pcids = vcpu.own[VcpuWord.CR4] & CR4.PCIDE != ZERO
        vcpu.mmu.reg[Reg.CR3] = value & ~CR3_BITS.NO_FLUSH if has_pcids else value
        flush(vcpu.tlb)
        return
    leave(vm, vcpu)
    count(vcpu.stat, Counter.INSN_EMULATION)
    if not set_cr3(vm, vcpu, value):
        write_log(vm, log, LogKind.GENERAL_PROTECTION, 0, event, value, ZERO)


@inner
def invalidate_all_roots(vm, vcpu, gva):
    """INVLPG under the root in use and under those that are kept (facts 9.4)."""
    if vcpu.own[VcpuWord.ROOT] != NO_TABLE:
        invalidate_current(vm, vcpu, gva)
    for i in range(PREVIOUS_ROOTS):
        root = vcpu.own[VcpuWord.PREVIOUS_ROOT + i]
        if root != NO_TABLE:
            invalidate_under(vm, vcpu, gva, root, vcpu.own[VcpuWord.ROOT_LEVEL])


@inner
def invalidate_page(vm, vcpu, gva):
    """INVLPG. With two-dimensional paging KVM does not see it."""
    if vm.word[VmWord.TDP] == ZERO:
        leave(vm, vcpu)
        count(vcpu.stat, Counter.INSN_EMULATION)
        count(vcpu.stat, Counter.INVLPG)
    invalidate(vcpu.tlb, gva)
    if vm.word[VmWord.TDP] == ZERO and is_shadow_paging(vm, vcpu):
        invalidate_all_roots(vm, vcpu, gva)


@inner(inline=True)
def invalidate_all(vm, vcpu):
    """INVPCID of everything, or an INVLPG whose operand is not known."""
    if vm.word[VmWord.TDP] == ZERO:
        leave(vm, vcpu)
        count(vcpu.stat, Counter.INSN_EMULATION)
        ask_one(vm, vcpu, FLUSH_GUEST)
    flush(vcpu.tlb)


@inner
def is_unseen(own, cr0, cr4, efer):
    """Whether KVM does not see CR0 being loaded: with paging and write protection on, a change of TS and MP alone does not exit."""
    if own[VcpuWord.CR4] != cr4 or own[VcpuWord.EFER] != efer or cr0 & CR0_ON != CR0_ON:
        return False
    return (own[VcpuWord.CR0] ^ cr0) & ~CR0_FREE == ZERO


@inner
def set_registers(vm, vcpu, table, row, by_guest):
    """CR0, CR4, EFER and what follows from them, and CR3 where user space sets them all (KVM_SET_SREGS), which unloads the roots if
    any is another."""
    own, reg = vcpu.own, vcpu.mmu.reg
    old_cr3 = reg[Reg.CR3]
    cr3 = old_cr3 if by_guest else table.mmu.reg[row, Reg.CR3]
    changed = cr3 != old_cr3 or table.mmu.reg[row, Reg.MODE] == MODE_PAE
    for i in range(table.raw.shape[1]):
        changed |= own[VcpuWord.CR0 + i] != table.raw[row, i]
    load_row(vcpu.mmu, table, row, cr3)
    own[VcpuWord.FETCH_ACCESS] = ZERO
    if is_nested(vcpu.nested, own):
        flush(vcpu.tlb)
        return
    own[VcpuWord.REGISTERS] = row
    shadowed = vm.word[VmWord.TDP] == ZERO
    if by_guest:
        flush(vcpu.tlb)
        if shadowed and not is_unseen(own, table.raw[row, 0], table.raw[row, 1], table.raw[row, 2]):
            leave(vm, vcpu)
            count(vcpu.stat, Counter.INSN_EMULATION)
            change_registers(vm, vcpu, table.raw[row, 0], table.raw[row, 1], table.raw[row, 2])
    elif changed:
        unload_roots(vm, vcpu)
    if shadowed and reg[Reg.MODE] == MODE_PAE:
        load_pdptes(vm, vcpu, cr3, reg[Reg.PDPTE_RESERVED])
    for i in range(table.raw.shape[1]):
        own[VcpuWord.CR0 + i] = table.raw[row, i]
    set_role(vm, vcpu)


@inner
def host_event(vm, vcpus, vcpu, prepared, op, address, value):
    """What user space does."""
    stat = vcpu.stat
    if op == SLOT_CREATE:
        host.create_slot(vm, vcpus, stat, prepared[value])
    elif op == SLOT_DELETE:
        host.delete_slot(vm, vcpus, stat, address)
    elif op == SLOT_FLAGS:
        host.set_slot_flags(vm, vcpus, stat, address, value)
    elif op in (DIRTY_GET, DIRTY_CLEAR):
        number = slot_by_id(vm, address)
        if number == NO_SLOT:
            return
        for i in range(len(vcpus.own)):
            dirty_log.collect_pml(vm, vcpu_of(vcpus, i))
        if op == DIRTY_GET:
            dirty_log.get(vm, stat, vm.mem.slots[number])
        else:
            dirty_log.clear(vm, stat, vm.mem.slots[number])
    elif op == UNMAP:
        host.unmap(vm, stat, address, value)
    elif op == AGE:
        host.age(vm, stat, address, value)
    elif op == PAGE_LIMIT:
        vm.word[VmWord.REQUESTED_PAGES] = value
        set_page_limit(vm, stat, value)
    elif op == PARAMETER:
        host.set_parameter(vm, stat, address, value)


@kernel
def drive(vm, vcpus, table, prepared, log, supply, events, first):
    """Replay `events` from index `first` on; returns the index of the event that ended it, or their number.

    `vm.word[VmWord.STOP]` says why (a `Stop`). Everything that reaches this kernel was validated: see machine.py.

    Args:
        vm: KvmState.
        vcpus: VcpuState with one more leading axis.
        table: RegisterTable.
        prepared: MEMSLOT rows that SLOT_CREATE events name.
        log: LOG rows; `vm.word[VmWord.LOGGED]` of them are in use. When it is nearly full the replay stops, if it is to be read.
        supply: uint64, data of device reads in order.
        events: EVENT rows.
    """
    vcpu = vcpu_of(vcpus, vm.word[VmWord.VCPU])
    two_dimensional = vm.word[VmWord.TDP] != ZERO
    tells_all = vm.word[VmWord.LOG_ACCESSES] != ZERO
    vm.word[VmWord.STOP] = ZERO
    fetched = NOT_FETCHED
    i = first
    while i < len(events):
        missed, touched = False, not_plain()
        if events[i]["op"] <= DEVICE and not tells_all:
            i, fetched, touched = run_plainly(vm, vcpu, events, i, fetched)
            if i == len(events):
                break
            if touched.status == Status.DONE:
                note_fetch(vcpu, events, fetched)
                stop(vm, Stop.DIFFERS, touched.gpa, ZERO)
                return i
        row = events[i]
        op, address, value = row["op"], row["address"], row["value"]
        if op <= DEVICE:
            fetched = i if row["access"] & F != NO else fetched
            missed = not tells_all and not is_asked(vm, vcpu)
        note_fetch(vcpu, events, fetched)
        fetched = NOT_FETCHED
        if op <= STORE or op in (LOAD, WRITE, EXCHANGE):
            if vm.word[VmWord.LOGGED] + LOG_MARGIN > np.uint64(len(log)) and vm.word[VmWord.STOP_WHEN_FULL] != ZERO:
                stop(vm, Stop.LOG_FULL, address, ZERO)
                return i
            if not enter(vm, vcpu):
                return i
            if op == STORE:
                count(vcpu.stat, Counter.STORES)
                if not two_dimensional:
                    if i > 0 and is_own_store(events[i - 1], row):
                        write_memory(vm.mem.words, address, WORD_BYTES, value)
                    else:
                        store_unseen(vm, vcpu, address, value)
                    i += 1
                    continue
            known, stored, compared = False, ZERO, ZERO
            if i + 1 < len(events):
                compared = events[i + 1]["value"]
                if not two_dimensional and op <= DEVICE and is_own_store(row, events[i + 1]):
                    known, stored = True, compared >> ((value & (WORD_BYTES - ONE)) << BYTE_BITS)
            gva, size, access = access_of_row(op, row)
            touched, second = access_bytes(vm, vcpu, log, i, gva, size, access, missed, touched)
            touched = finish(vm, vcpu, log, supply, i, row, compared, known, stored, touched, second)
            if op == STORE:
                if touched.status == Status.STOP:
                    return i
            elif touched.status == Status.REFLECTED:
                write_log(vm, log, LogKind.NESTED_EXIT, np.uint8(touched.gpa), i, touched.address, touched.pferr)
                vcpu = end_nested(vcpu.nested, vm, vcpus, vcpu, table)
                while i < len(events) and events[i]["op"] != VMEXIT:
                    i += 1
            elif not after_access(vm, vcpu, log, i, row, touched):
                return i
        elif op == CR3:
            load_cr3(vm, vcpu, log, i, value)
        elif op == INVLPG:
            invalidate_page(vm, vcpu, address)
        elif op == FLUSH:
            invalidate_all(vm, vcpu)
        elif op == VCPU:
            vm.word[VmWord.VCPU] = value
            vcpu = vcpu_of(vcpus, value)
        elif op == EXIT:
            if not enter(vm, vcpu):
                return i
            leave(vm, vcpu)
            count(vcpu.stat, Counter.IO_EXITS)
        elif op == VMRUN:
            if not enter(vm, vcpu):
                return i
            vcpu = run_nested(vcpu.nested, vm, vcpus, vcpu, table, address, value)
        elif op == VMEXIT:
            if not enter(vm, vcpu):
                return i
            leave(vm, vcpu)
            vcpu = end_nested(vcpu.nested, vm, vcpus, vcpu, table)
        elif op == INVEPT:
            if not enter(vm, vcpu):
                return i
            invalidate_ept(vcpu.nested, vm, vcpu, value)
        elif op in (MODE, REGISTERS):
            set_registers(vm, vcpu, table, value, op == REGISTERS)
        else:
            host_event(vm, vcpus, vcpu, prepared, op, address, value)
        i += 1
    note_fetch(vcpu, events, fetched)
    return len(events)
