"""Mutation check: deliberately broken variants, each of which the suite must catch.

A variant is one replacement in one file. It runs in a copy of the tree, interpreted (compiling costs more than it tells), against the
tests of its area; a test must fail. A few seeded ones run always, all of them with `pytest -m long`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SEED

from fastmmu._jit import JIT

WALK = ("tests/test_walk.py", "tests/test_access_matrix.py", "tests/test_translate.py")
MMIO = ("tests/test_mmio.py",)
KVM = ("tests/test_kvm_rules.py", "tests/test_scenarios.py")
STREAMS = ("tests/test_kvm_rules.py", "tests/test_streams.py")
SHADOW = ("tests/test_shadow_rules.py", "tests/test_scenarios.py")
TLB_KEYS = ("tests/test_streams.py::test_protection_keys_bind_accesses_that_the_tlb_serves",)
FAST = ("tests/test_fast_fault.py",)
RACES = ("tests/test_races.py",)
LOCK = ("tests/test_lock.py",)
L1_L2, EPT12 = ("tests/test_nested_guest.py",), ("tests/test_nested_ept.py",)
EPT_TESTS, NESTED = ("tests/test_ept.py",), ("tests/test_nested.py",)
TOLD = ("tests/test_qualification.py",)
FIRST_PAGE = ("tests/test_scenarios.py::test_named_variants_come_out_the_same[recycled_first_page]",)
MANY_UNSYNC = ("tests/test_scenarios.py::test_named_variants_come_out_the_same[many_unsync]",)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = WALK


MUTANTS = (
    Mutant("no present check", "walk.py", "if gpte & GPTE64.P == ZERO:\n                return", "if False:\n                return"),
    Mutant("no reserved check", "walk.py", "reserved_row(large, level)] != ZERO:", "reserved_row(large, level)] & ZERO != ZERO:"),
    Mutant(
        "reserved before present",
        "walk.py",
        "            if gpte & GPTE64.P == ZERO:\n                return fault(mmu, level, access, ZERO)\n            large",
        "            if gpte & mmu.reserved[level] != ZERO:\n                return fault(mmu, level, access, PFERR.P | PFERR.RSVD)\n"
        "            if gpte & GPTE64.P == ZERO:\n                return fault(mmu, level, access, ZERO)\n            large",
    ),
    Mutant("no slot check", "walk.py", "if find_slot(mem.slots, table) == NO_SLOT:", "if table >= np.uint64(len(mem.words) * 8):"),
    Mutant("rights of the leaf alone", "walk.py", "rights &= gpte ^ GPTE64.NX\n            if trail", "rights = gpte ^ GPTE64.NX\n            if trail"),
    Mutant("NX not inherited", "walk.py", "rights &= gpte ^ GPTE64.NX\n            if trail", "rights &= gpte | GPTE64.NX\n            if trail"),
    Mutant("large pages ignored", "walk.py", "if level == ONE or large != ZERO:", "if level == ONE:"),
    Mutant("A not set", "walk.py", "wanted = gpte | GPTE64.A", "wanted = gpte"),
    Mutant("A of the leaf alone", "walk.py", "        gpte = trail[level]\n        wanted = gpte | GPTE64.A", "        gpte = trail[level]\n        wanted = gpte | (GPTE64.A if level == leaf_level else ZERO)"),
    Mutant("D on every level", "walk.py", "if level == leaf_level and write:", "if write:"),
    Mutant("D on reads", "walk.py", "if level == leaf_level and write:", "if level == leaf_level:"),
    Mutant("A of upper levels not looked at", "walk.py", "(rights & GPTE64.A == ZERO or", "(gpte & GPTE64.A == ZERO or"),
    Mutant("ROM written", "walk.py", '["kind"] != ROM', '["kind"] != ROM + ROM + ROM'),
    Mutant("no restart", "walk.py", "                continue\n        return Walk(True, page_gpa(mode", "                pass\n        return Walk(True, page_gpa(mode"),
    Mutant("A before the permission check", "walk.py", "        if denied:\n            return", "        if denied and (trail is None or update_accessed_dirty(mem, trail, mode, root, gva, level, write)):\n            return"),
    Mutant("clean pages writable", "walk.py", "page_access &= ~ACC.W  # so that", "page_access &= ACC.ALL  # so that"),
    Mutant("a neighbour's half word exchanged", "walk.py", "(table >> HALF_SHIFT) + index, old,", "(table >> HALF_SHIFT) + (index | ONE), old,"),
    Mutant("PSE-36 forgotten", "walk.py", "((gpte & GPTE32.PSE36) << PSE36_SHIFT)", "ZERO"),
    Mutant("offset of a 4 KiB page", "walk.py", "    offset = page_offset_mask(level, mode.index_bits)\n    if", "    offset = page_offset_mask(ONE, mode.index_bits)\n    if"),
    Mutant("PDPTE not tested", "walk.py", "if pdpte & GPTE64.P == ZERO:", "if pdpte == ALL_ONES:"),
    Mutant("F always reported", "paging.py", "(PFERR.F if fetch else np.uint64(0))", "PFERR.F"),
    Mutant("CR0.WP ignored", "paging.py", "and (user or write_protect))", "and user)"),
    Mutant("SMEP ignored", "paging.py", "(fetch and smep and not user and page_u)", "False"),
    Mutant("SMAP without its exemption", "paging.py", "not user and not smap_off and page_u)", "not user and page_u)"),
    Mutant("implicit accesses exempt", "permission.py", "and access & PFERR.IMPLICIT == ZERO:", "and True:"),
    Mutant("no protection keys", "walk.py", "if mode.keys and key_fault", "if False and key_fault"),
    Mutant("keys bind fetches", "permission.py", "    if access & PFERR.F != ZERO:\n        return False\n", ""),
    Mutant("write-disable without WP", "permission.py", "or mmu.reg[Reg.WP] != ZERO)", "or True)"),
    Mutant("AD of the other register", "permission.py", "mmu.reg[Reg.PKRU] if page_access", "mmu.reg[Reg.PKRS] if page_access"),
    Mutant("reserved NX forgotten", "paging.py", "masks[:, 1:] |= GPTE64.NX", "pass"),
    Mutant("1 GiB pages always", "paging.py", "field(29, 13) if cpu.page_1g else GPTE64.PS", "field(29, 13)"),
    Mutant("AMD's bit 8 forgotten", "paging.py", "GPTE64.PS | (bit(8) if cpu.amd else np.uint64(0))", "GPTE64.PS"),
    Mutant("plain leaf without D", "paging.py", "needed | (GPTE64.D if write else nothing)", "needed"),
    Mutant("plain pointer without A", "paging.py", "needed = GPTE64.P | GPTE64.A", "needed = GPTE64.P"),
    Mutant("plain keys", "paging.py", "if any(key_rights(cpu)):", "if False:"),
    Mutant("plain SMAP", "paging.py", "(GPTE64.U if user_page_faults else nothing)", "nothing"),
    Mutant("blocks not canonical", "batch.py", "odd if is_canonical(levels, gva) else ONE", "odd"),
    Mutant("blocks out of the slot", "batch.py", "target if inside else root", "target"),
    Mutant("odd walks of a block left", "batch.py", "if lanes[WRONG + i] != ZERO:", "if lanes[WRONG + i] == ALL_ONES:"),
    Mutant("no generation test", "mmio.py", "if generation[0] != mmu.reg[Reg.GENERATION]:", "if False:", MMIO),
    Mutant("fill while updating", "mmio.py", "if mmu.reg[Reg.GENERATION] & GENERATION_UPDATING != ZERO:", "if False:", MMIO),
    Mutant("no clear on INVLPG", "replay.py", "            invalidate(cache, vm, stat, legal, address)", "            pass", MMIO),
    Mutant("no clear on CR3 loads", "replay.py", "            count(stat, Stat.CR3_LOADS)\n            flush(", "            count(stat, Stat.CR3_LOADS)\n            match_device if True else flush(", MMIO),
    Mutant("no clear on permission faults", "replay.py", "and covers(cache.entry, gva):", "and False:", MMIO),
    Mutant("CR3 not compared", "mmio.py", "if cr3[0] != mmu.reg[Reg.CR3]:", "if False:", MMIO),
    Mutant("no access check", "mmio.py", "if denied(generation, mmu, entry[Mmio.ACCESS], access):", "if False:", MMIO),
    Mutant("stale for ever", "judge.py", "        legal[0] = granted_today(vm, entry)", "        legal[0] |= granted_today(vm, entry)", MMIO),
    Mutant("changes never legal", "judge.py", "        legal[0] |= granted_today(vm, entry)", "        pass", MMIO),
    Mutant("the fast path does not log", "fault.py", "wanted & ~spte & NPT_SPTE.W != ZERO:\n        mark_dirty", "False:\n        mark_dirty", KVM),
    Mutant("the fast path opens huge pages", "fault.py", "            return ZERO  # only the first of its pages would be logged", "            pass", KVM),
    Mutant("stale MMIO sptes answer", "fault.py", " or mmio_generation(spte) != generation & MMIO_SPTE.GENERATION:", ":", KVM),
    Mutant("read-only memslots mapped for writes", "fault.py", "elif pferr & PFERR.W != ZERO and is_readonly(vm.mem.slots[number]):", "elif False:", KVM),
    Mutant("prefetch while logging", "leaf.py", "if is_readonly(slot) or (access & ACC.W != ZERO and logs_dirty(slot)) or gfn", "if is_readonly(slot) or gfn", KVM),
    Mutant("prefetch over the end of a memslot", "leaf.py", ' or gfn + (end - start) > slot["base"] + slot["pages"]:', ":", KVM),
    Mutant("prefetch goes on behind a run it cannot take", "leaf.py", "            if not prefetch_run(vm, vcpu, run, at):\n                return", "            prefetch_run(vm, vcpu, run, at)", KVM),
    Mutant("huge pages while logging", "shadow_fault.py", "if limit == ONE or number == NO_SLOT or logs_dirty(vm.mem.slots[number]):", "if limit == ONE or number == NO_SLOT:", KVM),
    Mutant("what is linked is what is wanted", "shadow.py", '    return page["gfn"] == gfn and np.uint64(page["role"]) == role\n', "    return True\n", ("tests/test_scenarios.py::test_named_variants_come_out_the_same[host_relinks]",)),
    Mutant("a huge page dropped without a flush", "shadow.py", '        zap_entry(vm, stat, index, np.uint64(vm.page[index >> INDEX_BITS]["level"]))\n        flush_remote(vm.word, stat)', '        zap_entry(vm, stat, index, np.uint64(vm.page[index >> INDEX_BITS]["level"]))', KVM),
    Mutant("tables give way under NX", "shadow_fault.py", "return vm.word[VmWord.NX_HUGE_PAGES] != ZERO and level > ONE and level == goal and is_table(spte, level)", "return False", KVM),
    Mutant("huge pages executable under NX", "spte.py", " and not (level > ONE and word[VmWord.NX_HUGE_PAGES] != ZERO)", "", KVM),
    Mutant("eight bits of generation", "spte.py", "| low | high |", "| low |", KVM),
    Mutant("logging takes MMU_WRITABLE", "dirty_log.py", "        clear_slot_bits(vm, stat, slot, ONE, W)", "        clear_slot_bits(vm, stat, slot, ONE, W | vm.word[VmWord.MMU_WRITABLE])", KVM),
    Mutant("no flush when logging begins", "dirty_log.py", "        unlock_for_writing(vm.word, stat)\n    flush_remote(vm.word, stat)\n\n\n@inner\ndef clear_logged_dirty", "        unlock_for_writing(vm.word, stat)\n\n\n@inner\ndef clear_logged_dirty", KVM),
    Mutant("GET leaves the bitmap", "dirty_log.py", "mask = exchange(vm.slot_words, at, ZERO)", "mask = vm.slot_words[at]", KVM),
    Mutant("CLEAR leaves huge pages MMU-writable", "dirty_log.py", "bits = W | vm.word[VmWord.MMU_WRITABLE]", "bits = W", KVM),
    Mutant("huge pages do not come back", "dirty_log.py", 'vm.word[VmWord.MAX_LEVEL]) >= level:', 'vm.word[VmWord.MAX_LEVEL]) > level:', KVM),
    Mutant("the generation advances by one", "host.py", "ADDRESS_SPACES = np.uint64(2)", "ADDRESS_SPACES = np.uint64(1)", KVM),
    Mutant("nothing zapped when the generation wraps", "host.py", "~(ADDRESS_SPACES - ONE) == ZERO:", "~(ADDRESS_SPACES - ONE) == ONE:", KVM),
    Mutant("an unmap without a flush", "host.py", "    if zapped:\n        flush_remote(vm.word, stat)", "    if zapped:\n        pass", KVM),
    Mutant("deleting a memslot zaps nothing", "host.py", "    zap_all_fast(vm, stat)\n    if logs_dirty", "    if logs_dirty", KVM),
    Mutant("roots in use recycled", "shadow.py", '        if vm.page[table]["roots"] == NONE:\n            number = zap(', "        if True:\n            number = zap(", KVM),
    Mutant("the newest recycled", "shadow.py", "    freed, table = ZERO, vm.word[VmWord.OLDEST]", "    freed, table = ZERO, vm.word[VmWord.NEWEST]", KVM),
    Mutant("a leaf dropped without its reverse map", "rmap.py", "        vm.slot_words[at] = remove(vm, vm.slot_words[at], index)\n", "        pass\n", KVM),
    Mutant("leaves of a freed table still counted", "tdp.py", "            count_leaf(stat, level, -1)\n        index += ONE", "            pass\n        index += ONE", KVM),
    Mutant("an empty range splits nothing", "tdp.py", "        if frame_at(gfn, level) >= end:", "        if gfn >= end:", KVM),
    Mutant("every TLB entry dirty", "hardware.py", "level, dirty, is_executable(word, spte))", "level, True, is_executable(word, spte))", STREAMS),
    Mutant("tables only read", "hardware.py", "        table_access |= PFERR.W\n    while True", "        pass\n    while True", STREAMS),
    Mutant("no page-modification logging", "descent.py", "            log_modification(vm, vcpu, gfn)", "            pass", STREAMS),
    Mutant("INVLPG forgets nothing", "tlb.py", "                if (tag & PAGE_NUMBER) >> shift == page >> shift:", "                if False:", STREAMS),
    Mutant("a flush forgets nothing", "tlb.py", "    tlb[last, 0] += FIRST_EPOCH", "    tlb[last, 0] += ZERO", STREAMS),
    Mutant("requested flushes counted, not done", "roots.py", "    count(vcpu.stat, Counter.TLB_FLUSH)\n    flush(vcpu.tlb)", "    count(vcpu.stat, Counter.TLB_FLUSH)", STREAMS),
    Mutant("requests served once", "roots.py", "        if not serve(vm, kvm_view(vcpu.nested, vcpu)):\n            return False", "        return serve(vm, kvm_view(vcpu.nested, vcpu))", SHADOW),
    Mutant("the emulator's A bits not logged", "shadow_fault.py", "            mark_dirty(vm, vm.mem.slots[number], table >> PAGE_SHIFT)\n", "", SHADOW),
    Mutant("keys not asked on a TLB hit", "tlb.py", "denied = denied or key_fault", "denied = denied or False and key_fault", TLB_KEYS),
    Mutant("a shadowed table is not write-protected", "shadow.py", "        if write_protect(vm, stat, slot, gfn):\n", "        if False:\n", SHADOW),
    Mutant("huge pages over shadowed tables", "shadow.py", "        disallow_huge(vm, slot, gfn, 1)", "        pass", SHADOW),
    Mutant("huge pages for ever forbidden", "shadow.py", "        disallow_huge(vm, vm.mem.slots[number], gfn, -1)", "        pass", SHADOW),
    Mutant("MMU_WRITABLE left on a shadowed table", "rmap.py", "    bits = NPT_SPTE.W | vm.word[VmWord.MMU_WRITABLE]\n    flushes = vm", "    bits = NPT_SPTE.W\n    flushes = vm", SHADOW),
    Mutant("a tracked page mapped writable", "leaf.py", "    rights = access & ~ACC.W if refused else access", "    rights = access", SHADOW),
    Mutant("tracked writes are not emulated", "unsync.py", '        if np.uint64(vm.page[table]["level"]) > ONE:\n            return True', '        if np.uint64(vm.page[table]["level"]) > ONE:\n            return False', SHADOW),
    Mutant("an upper table goes out of step", "unsync.py", "    if is_write_tracked(vm, slot, gfn):\n        return True\n    table", "    table", SHADOW),
    Mutant("a prefetch puts tables out of step", "unsync.py", "            if prefetch:\n                return True\n", "", SHADOW),
    Mutant("a sync puts tables out of step", "leaf.py", "ONE, access, old, False, host_writable, True)", "ONE, access, old, True, host_writable, False)", SHADOW),
    Mutant("the refused write is not emulated", "leaf.py", "    if refused and write:", "    if False:", SHADOW),
    Mutant("parents not told of an unsync page", "unsync.py", '    vm.page[table]["unsync"] = YES\n    mark_parents(vm, table)', '    vm.page[table]["unsync"] = YES', SHADOW),
    Mutant("only the next parent told", "unsync.py", '                vm.page[above]["work"] = work\n                work = above', "                pass", SHADOW),
    Mutant("a link does not tell of unsync pages", "unsync.py", '    if vm.page[child]["unsync_children"] != NONE or vm.page[child]["unsync"] != NO:', '    if vm.page[child]["unsync_children"] != NONE:', SHADOW),
    Mutant("a walk over unsync pages that stops at sixteen", "sync.py", "    while walk_unsync(vm, top):", "    if walk_unsync(vm, top):", SHADOW),
    Mutant("synced pages stay marked", "sync.py", "            mark_synced(vm, vcpu.stat, table)\n", "", SHADOW),
    Mutant("bits of synced pages stay", "sync.py", "            clear_path(vm)\n", "", MANY_UNSYNC),
    Mutant("synced tables stay writable", "sync.py", "            protected |= protect_table(", "            protected |= False and protect_table(", SHADOW),
    Mutant("protected tables not flushed", "sync.py", "        if protected:\n            flush_remote(vm.word, vcpu.stat)\n            flushes = False", "        if protected:\n            flushes = False", SHADOW),
    Mutant("unchanged leaves keep A and D", "leaf.py", "                vm.spt[index] = spte & ~bits\n                flushes |= spte & bits != ZERO\n", "", SHADOW),
    Mutant("the short way though D is clear", "leaf.py", "            access = access & ~ACC.W if gpte & GPTE64.D == ZERO else access\n            same = vm.shadowed[index] == (gpte & GPTE64.ADDR) | access", "            same = vm.shadowed[index] | ACC.W == (gpte & GPTE64.ADDR) | access | ACC.W", SHADOW),
    Mutant("the short way though A is clear", "leaf.py", "word[VmWord.DIRTY], GPTE64.P | GPTE64.A\n", "word[VmWord.DIRTY], GPTE64.P\n", SHADOW),
    Mutant("the short way though unchanged leaves stay", "leaf.py", "    if word[VmWord.SYNC_SKIPS_UNCHANGED] != ZERO:\n        bits = ZERO\n", "", SHADOW),
    Mutant("the short way for entries of 4 bytes", "leaf.py", " and role & ROLE.FOUR_BYTE_GPTE == ZERO\n", "\n", SHADOW),
    Mutant("unchanged leaves built anew", "leaf.py", "    if vm.word[VmWord.SYNC_SKIPS_UNCHANGED] != ZERO and access", "    if False and access", SHADOW),
    Mutant("no sync where it is forced", "roots.py", "    if vm.word[VmWord.FORCE_SYNC_ON_REUSE] != ZERO:", "    if False:", SHADOW),
    Mutant("a sync without a flush", "leaf.py", "        drop_leaf(vm, vcpu.stat, index)\n        return True\n    if vm.word[VmWord.SYNC", "        drop_leaf(vm, vcpu.stat, index)\n        return False\n    if vm.word[VmWord.SYNC", SHADOW),
    Mutant("a sync forgets the reverse map", "leaf.py", "        drop_leaf(vm, vcpu.stat, index)\n        return True\n    if vm.word[VmWord.SYNC", "        vm.spt[index] = ZERO\n        return True\n    if vm.word[VmWord.SYNC", SHADOW),
    Mutant("a moved page mapped where it was", "leaf.py", "    if gfn_of_entry(vm, index) != gfn or (access == ZERO and is_ept12(vcpu.nested, vcpu.mmu)):\n        drop_leaf(vm, vcpu.stat, index)\n        return True\n", "", SHADOW),
    Mutant("what the entry says is not remembered", "leaf.py", "    remember(vm, index, gfn, access)\n    slot", "    slot", SHADOW),
    Mutant("the MMIO spte of another device stays", "leaf.py", "if mmio_gfn(old) == gfn else ZERO", "if True else ZERO", SHADOW),
    Mutant("no write needs D", "leaf.py", "    return access & ~ACC.W if gpte & GPTE64.D == ZERO else access", "    return access", SHADOW),
    Mutant("the role's rights not asked at a sync", "leaf.py", "    access = ((role & ROLE.ACCESS) >> np.uint64(8)) & access_of", "    access = access_of", SHADOW),
    Mutant("a leaf of another frame kept", "leaf.py", "        elif number == NO_SLOT or pfn_of(old) != host_frame(vm.frames, gfn):", "        elif number == NO_SLOT:", SHADOW),
    Mutant("no flush when a leaf moves", "leaf.py", "            drop_leaf(vm, vcpu.stat, index)\n            flushes = True", "            drop_leaf(vm, vcpu.stat, index)", SHADOW),
    Mutant("rights of a leaf not remembered", "leaf.py", "    if was_mapped:\n        remember(vm, index, gfn, access)\n    else:", "    if not was_mapped:", SHADOW),
    Mutant("the upper half of a 4-byte table", "leaf.py", "(table >> HALF_SHIFT) + (quadrant << INDEX_BITS) + entry", "(table >> HALF_SHIFT) + entry", SHADOW),
    Mutant("prefetch past an invalid entry", "leaf.py", "            if not prefetch_gpte(vm, vcpu, at, read_gpte(vm, at), True):\n                return", "            prefetch_gpte(vm, vcpu, at, read_gpte(vm, at), True)", SHADOW),
    Mutant("prefetch without A", "leaf.py", "    if gpte_of(vcpu.nested, vcpu.mmu, gpte) & (GPTE64.P | GPTE64.A) != GPTE64.P | GPTE64.A:", "    if gpte & GPTE64.P == ZERO:", SHADOW),
    Mutant("prefetch with reserved bits", "leaf.py", "    return is_bad(vcpu.nested, vcpu.mmu, gpte, ONE)", "    return False", SHADOW),
    Mutant("prefetch for writing while logging", "leaf.py", "    if is_readonly(slot) or (unlogged and access", "    if is_readonly(slot) or (False and access", SHADOW),
    Mutant("prefetch of read-only memory", "leaf.py", "    if is_readonly(slot) or (unlogged and", "    if (unlogged and", SHADOW),
    Mutant("no sync at a load of CR3", "roots.py", "    if not keeps:\n        ask_one(vm, vcpu, MMU_SYNC | FLUSH_CURRENT)", "    if not keeps:\n        ask_one(vm, vcpu, FLUSH_CURRENT)", SHADOW),
    Mutant("no sync of a new root", "roots.py", "    sync_roots(vm, vcpu)\n    flush(vcpu.tlb)\n    return True", "    forget_mmio(vcpu)\n    flush(vcpu.tlb)\n    return True", SHADOW),
    Mutant("loads of CR3 that keep all flush", "roots.py", "    keeps = has_pcids and value & CR3.NO_FLUSH != ZERO", "    keeps = False", SHADOW),
    Mutant("kept roots of a flushed PCID stay", "roots.py", "            free_roots_of(vm, vcpu, cr3 & CR3.PCID)", "            pass", SHADOW),
    Mutant("kept roots of every PCID go", "roots.py", "        if vcpu.own[PREVIOUS_PGD + i] & CR3.PCID == pcid:", "        if True:", SHADOW),
    Mutant("a kept root for any CR3", "roots.py", "    return root != NO_TABLE and pgd == wanted and", "    return root != NO_TABLE and", SHADOW),
    Mutant("two kept roots", "roots.py", "KEPT = np.uint64(PREVIOUS_ROOTS)", "KEPT = np.uint64(PREVIOUS_ROOTS - 1)", SHADOW),
    Mutant("another CR3 leaves the device remembered", "roots.py", "    forget_mmio(vcpu)\n    vm.page[vcpu", "    vm.page[vcpu", SHADOW),
    Mutant("roots that were zapped stay", "roots.py", "        if kept != NO_TABLE and is_obsolete(vm, kept):", "        if False:", SHADOW),
    Mutant("kept roots out of step survive a guest-wide flush", "roots.py", "        free_unsync_roots(vm, vcpu)\n", "", SHADOW),
    Mutant("quarters of the directory alike", "roots.py", ">> PAGE_SHIFT, number << QUADRANT_SHIFT", ">> PAGE_SHIFT, ZERO", SHADOW),
    Mutant("PDPTEs not read again", "roots.py", "    if pae and not load_pdptes(", "    if pae and False and not load_pdptes(", SHADOW),
    Mutant("PDPTEs not checked", "roots.py", "        if pdpte & GPTE64.P != ZERO and pdpte & reserved != ZERO:", "        if False:", SHADOW),
    Mutant("a change of PDPTEs keeps the roots", "roots.py", "    if changed:\n        free_current(vm, vcpu)", "    if False:\n        free_current(vm, vcpu)", SHADOW),
    Mutant("another role keeps the roots", "roots.py", "ROLE_CR0 = CR0.PG | CR0.WP", "ROLE_CR0 = CR0.PG", SHADOW),
    Mutant("INVLPG leaves unsync leaves", "sync.py", '            if vm.page[table]["unsync"] != NO:', "            if False:", SHADOW),
    Mutant("INVLPG of the current root alone", "drive.py", "        if root != NO_TABLE:\n            invalidate_under", "        if False:\n            invalidate_under", SHADOW),
    Mutant("INVLPG without a flush", "sync.py", "                if is_present(spte):\n                    flush_remote(vm.word, vcpu.stat)\n", "", SHADOW),
    Mutant("INVLPG leaves the device remembered", "sync.py", "    if covers(vcpu.own[MMIO:MMIO_GENERATION], gva):\n        forget_mmio(vcpu)\n", "", SHADOW),
    Mutant("no quadrant of a leaf table", "shadow.py", "        role |= (index & ONE) << QUADRANT_SHIFT", "        pass", SHADOW),
    Mutant("the role without CR0.WP", "shadow.py", "    if cr0 & CR0.WP != ZERO:\n        role |= ROLE.CR0_WP\n    else:", "    if cr0 & CR0.WP == ZERO:", SHADOW),
    Mutant("the role without SMEP_ANDNOT_WP", "shadow.py", "        role |= ROLE.SMEP_ANDNOT_WP if cr4 & CR4.SMEP != ZERO else ZERO\n", "", SHADOW),
    Mutant("the role of SMEP with CR0.WP too", "shadow.py", "        role |= ROLE.CR0_WP\n    else:\n", "        role |= ROLE.CR0_WP\n    if True:\n", SHADOW),
    Mutant("a table grants what its own entry grants", "shadow_fault.py", "        rights &= gpte ^ GPTE64.NX", "        rights = gpte ^ GPTE64.NX", SHADOW),
    Mutant("direct pages keep rights that changed", "shadow.py", 'page["gfn"] == gfn and np.uint64(page["role"]) == role', 'page["gfn"] == gfn', SHADOW),
    Mutant("pages over their own tables mapped large", "shadow_fault.py", "    if walk.level == ONE or changes_itself(vm, vcpu, mode_of(vcpu.mmu), gva, walk, pferr):", "    if walk.level == ONE:", SHADOW),
    Mutant("the user keeps a page without CR0.WP", "shadow_fault.py", "        access = (access | ACC.W) & ~ACC.U", "        access = access | ACC.W", SHADOW),
    Mutant("SMEP forgotten without CR0.WP", "shadow_fault.py", "            access &= ~ACC.X", "            pass", SHADOW),
    Mutant("a kept table linked out of step", "shadow_fault.py", "                sync_children(vm, vcpu, child)", "                pass", SHADOW),
    Mutant("a found page not synced", "shadow.py", '        if vm.page[table]["unsync"] != NO and sync_page(vm, vcpu, table):\n            flush_remote(vm.word, vcpu.stat)\n', "", SHADOW),
    Mutant("a found page synced without a flush", "shadow.py", '        if vm.page[table]["unsync"] != NO and sync_page(vm, vcpu, table):\n            flush_remote(vm.word, vcpu.stat)', '        if vm.page[table]["unsync"] != NO:\n            sync_page(vm, vcpu, table)', SHADOW),
    Mutant("an unsync page of the wrong level stays", "shadow.py", '            elif role & ROLE.LEVEL > ONE and page["unsync"] != NO:\n                zap(vm, stat, table)\n', "", SHADOW),
    Mutant("what a refused access met stays", "shadow_fault.py", "            invalidate_current(vm, vcpu, gva)", "            pass", SHADOW),
    Mutant("a flood at the fourth write", "track.py", "FLOOD = np.uint8(3)", "FLOOD = np.uint8(4)", SHADOW),
    Mutant("no floods", "track.py", '    return page["floods"] == FLOOD', "    return False", SHADOW),
    Mutant("floods of leaf tables", "track.py", "        return False  # it can become unsync instead", "        pass", SHADOW),
    Mutant("floods not counted anew where a fault goes through", "shadow_fault.py", '    vm.page[table]["floods"] = NO', "    pass", SHADOW),
    Mutant("floods not counted anew by a tracked write", "fault.py", "        clear_floods(vm, vcpu, gva)\n", "", SHADOW),
    Mutant("misaligned writes taken for entries", "track.py", "    return (offset ^ (offset + size - ONE)) & ~inside != ZERO or size < HALF", "    return False", SHADOW),
    Mutant("short writes taken for entries", "track.py", " & ~inside != ZERO or size < HALF", " & ~inside != ZERO", SHADOW),
    Mutant("one byte is no entry", "track.py", "    if offset & inside == ZERO and size == ONE:\n        return False\n", "", SHADOW),
    Mutant("4 bytes not made an entry", "track.py", "        gpa, size = gpa & ~(WHOLE - ONE), WHOLE\n", "        pass\n", SHADOW),
    Mutant("one of two directory entries zapped", "track.py", "            entries = DIRECTORY\n", "", SHADOW),
    Mutant("every quarter zapped", "track.py", "        if offset >> PAGE_SHIFT != (role & ROLE.QUADRANT) >> QUADRANT_SHIFT:", "        if False:", SHADOW),
    Mutant("entries zapped without a flush", "track.py", "    commit_zapped(vm, vcpu.stat, flushes)", "    commit_zapped(vm, vcpu.stat, False)", SHADOW),
    Mutant("entries not zapped", "track.py", "        zap_entry(vm, stat, index, level)", "        pass", SHADOW),
    Mutant("an exchange writes first", "drive.py", "    reads, writes = op in (LOAD, EXCHANGE), op == EXCHANGE", "    reads, writes = op == LOAD, op == EXCHANGE", SHADOW),
    Mutant("unsync pages below survive a zap", "shadow.py", '    if np.uint64(vm.page[table]["level"]) > ONE:\n        while', "    if False:\n        while", SHADOW),
    Mutant("recycling counts the page alone", "shadow.py", "    return freed + ONE if zap_alone(vm, stat, table) else freed", "    return ONE if zap_alone(vm, stat, table) else ZERO", SHADOW),
    Mutant("zapped pages still linked", "shadow.py", '    while page["parents"] != ZERO:\n        drop_parent(vm, table, at_cursor(vm, first(page["parents"])))\n', "", SHADOW),
    Mutant("roots that were zapped are used on", "shadow.py", "    elif not is_obsolete(vm, table):\n        ask(vm.word, np.uint64(Request.FREE_OBSOLETE_ROOTS))\n", "", SHADOW),
    Mutant("zapped pages freed without a flush", "shadow.py", "    if table != NO_TABLE or flushes:\n        flush_remote", "    if flushes:\n        flush_remote", SHADOW),
    Mutant("a root that was let go stays", "shadow.py", "        zap(vm, stat, table)\n\n\n@inner\ndef zap_obsolete", "        pass\n\n\n@inner\ndef zap_obsolete", SHADOW),
    Mutant("a long list is kept", "rmap.py", "    if had > LONGEST:", "    if False:", SHADOW),
    Mutant("collapsible leaves of the guest's tables go too", "dirty_log.py", 'if page["role"] & DIRECT != NONE and level', "if level", SHADOW),
    Mutant("only the second page starts again", "guest.py", "elif fetching:\n            target, wanted", "elif fetching:\n            target = second if first.status == Status.DONE else gva\n            _, wanted", FIRST_PAGE),
    Mutant("a plain walk forgets the leaf's U", "roots.py", "        needed |= ACC.U\n", "        pass\n", SHADOW),
    Mutant("a plain walk forgets SMEP and SMAP", "roots.py", "        forbidden |= ACC.U\n", "        pass\n", SHADOW),
    Mutant("a plain walk sets no D", "hardware.py", "        if cmpxchg(vm.spt, index, spte, spte | missing) != spte:", "        if False:", SHADOW),
    Mutant("old epochs come back", "tlb.py", "                tlb[index, i] = ZERO\n        tlb", "                pass\n        tlb", ("tests/test_streams.py",)),
    Mutant("every fault takes the lock", "fault.py", "if vm.word[VmWord.FAST_PAGE_FAULT] != ZERO:", "if False:", FAST),
    Mutant("the fast path cannot be switched off", "fault.py", "if vm.word[VmWord.FAST_PAGE_FAULT] != ZERO:", "if True:", FAST),
    Mutant("a huge page that logs is fixed fast", "fault.py", "            return ZERO  # only the first", "            pass  # only the first", FAST),
    Mutant("the fast path dirties what it does not make writable", "fault.py", "wanted & ~spte & NPT_SPTE.W != ZERO:", "True:", FAST),
    Mutant("a huge page is plain to the fast path", "fault.py", "plain = level == ONE and spte", "plain = spte", FAST),
    Mutant("an access-tracked leaf is plain", "fault.py", " == writable and word[VmWord.AD] != ZERO", " == writable", FAST),
    Mutant("access tracking is not undone", "fault.py", "wanted = restore_access(spte)", "wanted = spte", FAST),
    Mutant("an aged page keeps W", "spte.py", "(spte & ~(EPT_SPTE.R | EPT_SPTE.W | EPT_SPTE.X)) | ((spte", "(spte & ~(EPT_SPTE.R | EPT_SPTE.X)) | ((spte", FAST),
    Mutant("saved rights stay", "spte.py", "return (spte & ~EPT_SPTE.SAVED) |", "return spte |", FAST),
    Mutant("aging does not flush", "host.py", "    if young:\n        flush_remote", "    if False:\n        flush_remote", FAST),
    Mutant("what is old is aged again", "spte.py", "        if not is_accessed(word, old):\n            return False\n", "", ("tests/test_fast_fault.py::test_aging_of_huge_pages_and_of_nothing",)),
    Mutant("two writers", "lock.py", "while cmpxchg(word, LOCK, ZERO, WRITER) != ZERO:", "while False:", LOCK),
    Mutant("a reader beside the writer", "lock.py", "if seen & WRITER == ZERO and cmpxchg(", "if cmpxchg(", LOCK),
    Mutant("a writer beside readers", "lock.py", "while cmpxchg(word, LOCK, ZERO, WRITER) != ZERO:", "while cmpxchg(word, LOCK, load(word, LOCK) & ~WRITER, WRITER) & WRITER != ZERO:", LOCK),
    Mutant("a reader leaves for all", "lock.py", "    fetch_sub(word, LOCK, ONE)", "    store(word, LOCK, ZERO)", LOCK),
    Mutant("what goes is not frozen", "tdp.py", "    spte = exchange(spt, index, FROZEN)\n    while", "    spte = exchange(spt, index, ZERO)\n    while", LOCK),
    Mutant("nobody waits for a frozen entry", "tdp.py", "    while spte == FROZEN:", "    while False:", LOCK),
    Mutant("a frozen entry is replaced", "tdp.py", "    if old == FROZEN:\n        return False\n", "", LOCK),
    Mutant("a flush does not wait for who reads", "pool.py", "if running == KVM or (", "if running != GUEST or (", LOCK),
    Mutant("tables are free at once", "pool.py", "np.uint64(VmWord.DEFERRED) if vm.word[VmWord.THREADS] != ZERO else np.uint64(VmWord.FREE_TABLE)", "np.uint64(VmWord.FREE_TABLE)", LOCK),
    Mutant("a lost exchange is given up", "fault.py", "    for _ in range(FAST_RETRIES):", "    for _ in range(0):", RACES),
    Mutant("a lost exchange is no try", "fault.py", "        return Outcome.RETRY\n    count(vcpu.stat, Counter.FAST_FIXED)", "    count(vcpu.stat, Counter.FAST_FIXED)", RACES),
    Mutant("EPT: W without R accepted", "ept.py", "bad_rights = (w and not r) or", "bad_rights =", EPT_TESTS),
    Mutant("EPT: execute-only always", "ept.py", "(x and not r and not caps.execute_only)", "False", EPT_TESTS),
    Mutant("EPT: any memory type", "ept.py", " or memory_type in BAD_TYPES else", " else", EPT_TESTS),
    Mutant("EPT: user X alone is not present", "ept.py", "present=RIGHTS | user_x,", "present=RIGHTS,", EPT_TESTS),
    Mutant("EPT: user X is no X of the pattern", "ept.py", "(entry & PATTERN) | ((entry & ept.user_x) >> USER_X_TO_X)", "entry & PATTERN", EPT_TESTS),
    Mutant("EPT: rights before misconfigurations", "ept.py", "            if is_misconfigured(ept, entry, level):", "            if rights & entry & needed != needed:\n                return violation(ept, access, rights & entry, paging_structure, level)\n            if is_misconfigured(ept, entry, level):", EPT_TESTS),
    Mutant("EPT: rights of the leaf alone", "ept.py", "            rights &= entry\n", "            rights = entry\n", EPT_TESTS),
    Mutant("EPT: rights told of an absent entry", "ept.py", "return violation(ept, access, ZERO, paging_structure, level)", "return violation(ept, access, rights, paging_structure, level)", EPT_TESTS),
    Mutant("EPT: a table access only reads", "ept.py", "        access |= EPT.R | EPT.W\n", "        pass\n", EPT_TESTS),
    Mutant("EPT: a table access is a write, not a read", "ept.py", "        access |= EPT.R | EPT.W\n", "        access = access & EPT.X | EPT.W\n", EPT_TESTS),
    Mutant("EPT: final for all", "ept.py", "    if not paging_structure:\n", "    if True:\n", EPT_TESTS),
    Mutant("EPT: no linear address", "ept.py", " | QUALIFICATION.LINEAR\n", "\n", EPT_TESTS),
    Mutant("EPT: user X not told", "ept.py", "((rights & ept.user_x) >> USER_X_SHIFT)", "ZERO", EPT_TESTS),
    Mutant("EPT: fetches by the supervisor's right", "ept.py", "ept.user_x if user_linear and ept.user_x != ZERO else EPT.X", "EPT.X", EPT_TESTS),
    Mutant("EPT: D on every level", "ept.py", "        if level == leaf_level and write:\n            wanted |= ept.dirty", "        if write:\n            wanted |= ept.dirty", EPT_TESTS),
    Mutant("EPT: D not looked at", "ept.py", " or (write and entry & ept.dirty != ept.dirty):", ":", EPT_TESTS),
    Mutant("EPT: flags whatever the EPTP says", "ept.py", "flags = bool(eptp & int(EPTP.AD))", "flags = True", EPT_TESTS),
    Mutant("EPT: no restart", "ept.py", "            if not set_flags(mem, ept, trail, gpa, level, write):\n                continue", "            set_flags(mem, ept, trail, gpa, level, write)", EPT_TESTS),
    Mutant("EPT: 29:12 of a 1 GiB page", "ept.py", "large[3] |= field(29, 12) if", "large[3] |= field(29, 13) if", EPT_TESTS),
    Mutant("EPT: pointers have a memory type", "ept.py", "    pointer[2:] |= field(6, 3)\n", "", EPT_TESTS),
    Mutant("EPT: 2 MiB pages always", "ept.py", "field(20, 12) if caps.page_2m else EPT.PS", "field(20, 12)", EPT_TESTS),
    Mutant("EPT: MAXPHYADDR forgotten", "ept.py", "    masks[:, 1:] = physical_bits_above(caps.maxphyaddr, PHYSICAL_BITS - 1)\n", "", EPT_TESTS),
    Mutant("EPT: tables read outside the slots", "ept.py", "            if find_slot(mem.slots, table) == NO_SLOT:", "            if table >= np.uint64(len(mem.words) * 8):", EPT_TESTS),
    Mutant("EPT: addresses wrap around", "ept.py", "    if gpa >> (PAGE_SHIFT + INDEX_BITS * ept.levels) != ZERO:\n        return violation(ept, access, ZERO, paging_structure, ZERO)\n", "", EPT_TESTS),
    Mutant("EPT: reserved bits of the EPTP", "ept.py", "field(11, 7) | field(63, PHYSICAL_BITS)", "field(63, PHYSICAL_BITS)", EPT_TESTS),
    Mutant("nested: tables read as by a read", "nested.py", "    if paging_structure or access & EPT.W != ZERO:", "    if access & EPT.W != ZERO:", NESTED),
    Mutant("nested: page and final exchanged", "nested.py", "PFERR.GUEST_PAGE if paging_structure else PFERR.GUEST_FINAL", "PFERR.GUEST_FINAL if paging_structure else PFERR.GUEST_PAGE", NESTED),
    Mutant("nested: a supervisor's accesses", "nested.py", "    pferr = PFERR.U\n", "    pferr = ZERO\n", NESTED),
    Mutant("nested: the guest's tables not translated", "nested.py", "            at = found.hpa & PAGE_MASK\n", "            at = gpa & PAGE_MASK\n", NESTED),
    Mutant("nested: no slot check of the guest's tables", "nested.py", "            if find_slot(mem.slots, at) == NO_SLOT:\n                return outside(at, level)", "            if at >= np.uint64(len(mem.words) * 8):\n                return outside(at, level)", NESTED),
    Mutant("nested: flags set without asking EPT", "nested.py", "            if not tables_are_written(host.ept):", "            if False:", NESTED),
    Mutant("nested: asked for a write only", "nested.py", "stat, gpa, EPT.R | EPT.W, True, False)", "stat, gpa, EPT.W, True, False)", NESTED),
    Mutant("nested: every entry asked for", "nested.py", "        if with_flags(gpte, level == leaf_level, write) != gpte:", "        if True:", NESTED),
    Mutant("nested: flags not set", "nested.py", "            if not set_guest_flags(mem, scratch, mode, gva, level, write):\n                continue\n", "", NESTED),
    Mutant("nested: ROM written", "nested.py", '["kind"] != ROM', '["kind"] != ROM + ROM + ROM', NESTED),
    Mutant("nested: a fetch is a read", "nested.py", "return EPT.X if access & PFERR.F != ZERO else EPT.R", "return EPT.R", NESTED),
    Mutant("nested: the access makes the address user-mode", "nested.py", "    user = page_access & ACC.U != ZERO\n", "    user = access & PFERR.U != ZERO\n", NESTED),
    Mutant("nested: plain accesses of one kind", "nested.py", "kind = WRITE_KIND if access & PFERR.W != ZERO else", "kind = READ_KIND if access & PFERR.W != ZERO else", NESTED),
    Mutant("nested: plain large pages anywhere", "nested.py", "if entry & reserved == ZERO else NOWHERE", "if True else NOWHERE", NESTED),
    Mutant("nested: plain addresses wrap around", "nested.py", "    if gpa >> (PAGE_SHIFT + INDEX_BITS * level) != ZERO:\n        return NOWHERE\n", "", NESTED),
    Mutant("nested: plain leaves without D", "translate_nested.py", "needed | (ept.dirty if write else ZERO)", "needed", NESTED),
    Mutant("nested: any memory type is plain", "translate_nested.py", "row[PlainColumn.LEAF] | FOLDED_TYPE |", "row[PlainColumn.LEAF] |", NESTED),
    Mutant("nested: memory types 4 and 2 exchanged", "nested.py", "return entry ^ ((entry >> ONE) & TYPE_MIDDLE)", "return entry ^ (entry >> ONE)", NESTED),
    Mutant("nested: plain fetches without user X", "translate_nested.py", "(EPT.X | ept.user_x if kind == HostKind.FETCH else ZERO)", "(EPT.X if kind == HostKind.FETCH else ZERO)", NESTED),
    Mutant("nested: PDPTEs are a table access", "translate_nested.py", "& ~(QUALIFICATION.LINEAR | QUALIFICATION.FINAL))", "& ~QUALIFICATION.FINAL)", NESTED),
    Mutant("nested: blocks out of the memory", "nested_batch.py", "(ZERO if inside else ONE)\n            lanes[WRONG + i] |= entry", "ZERO\n            lanes[WRONG + i] |= entry", NESTED),
    Mutant("nested: large pages of blocks unchecked", "nested_batch.py", "entry & host.reserved_2m if large else wrong", "ZERO if large else wrong", NESTED),
    Mutant("nested: offsets of large pages in blocks", "nested_batch.py", "offset = LARGE_OFFSET if large != ZERO else PAGE_OFFSET", "offset = PAGE_OFFSET", NESTED),
    Mutant("nested: leaves of blocks unchecked", "nested_batch.py", "        lanes[WRONG + i] |= (fold_type(entry) & checks.leaf_mask) ^ checks.leaf\n", "", NESTED),
    Mutant("nested: one table for a whole block", "nested_batch.py", "if differ & PAGE_MASK == ZERO else NOWHERE", "if True else NOWHERE", NESTED),
    Mutant("nested: cached rights unchecked", "nested_caches.py", "if rights & plain.pointer == plain.pointer and seen & forbidden == ZERO:", "if True:", NESTED),
    Mutant("nested: a tag without its level's bits", "nested_caches.py", "(PAGE_SHIFT + INDEX_BITS * level)) << ONE", "(PAGE_SHIFT + INDEX_BITS * (level + ONE))) << ONE", NESTED),
    Mutant("nested: pages known for any access", "nested_caches.py", "<< KIND_SHIFT | kind) << ONE", "<< KIND_SHIFT) << ONE", NESTED),
    Mutant("nested: structures never forgotten", "nested_caches.py", "            structures[level, number, Structure.TAG] = ZERO\n", "            pass\n", NESTED),
    Mutant("U of the second dimension not asked for", "descent.py", "if spte & word[VmWord.USER] == ZERO and word[VmWord.TDP] != ZERO and", "if False and", L1_L2),
    Mutant("L2's entries read at their own gpas", "descent.py", "    if not is_nested(vcpu.nested, vcpu.own):\n        return gpa", "    if True:\n        return gpa", L1_L2),
    Mutant("L2's flags set at their own gpas", "hardware.py", "            if is_nested(vcpu.nested, vcpu.own):\n                mapped, _, held", "            if False:\n                mapped, _, held", L1_L2),
    Mutant("no sync where guests are switched", "nested_guest.py", "MMU_SYNC | FLUSH_CURRENT)", "FLUSH_CURRENT)", L1_L2),
    Mutant("no flush where guests are switched", "nested_guest.py", "    ask_one(vm, vcpu, MMU_SYNC | FLUSH_CURRENT)", "    ask_one(vm, vcpu, MMU_SYNC)", L1_L2),
    Mutant("L1 comes back with L2's CR3", "nested_guest.py", "own[VcpuWord.REGISTERS], own[VcpuWord.KEPT_CR3])", "own[VcpuWord.REGISTERS], vcpu.mmu.reg[Reg.CR3])", L1_L2),
    Mutant("L1 is not told what failed", "ept12.py", "(pferr & WHERE) | own[VcpuWord.INJECTED]", "own[VcpuWord.INJECTED]", L1_L2),
    Mutant("a fault of the second dimension is a #PF of L1", "shadow_fault.py", "    if not nested:\n        count", "    if True:\n        count", L1_L2),
    Mutant("a device of L2 at its own gpa", "guest.py", "return Touch(Status.DONE, held.gpa, ZERO, ZERO)", "return Touch(Status.DONE, gpa, ZERO, ZERO)", L1_L2),
    Mutant("unmaps leave L2's pages", "host.py", "            zapped |= zap_leafs(vm, stat, low, high)\n        if not has_rmaps(vm.word):", "            zapped |= zap_leafs(vm, stat, low, high)\n        if vm.word[VmWord.TDP_MMU] != ZERO:", L1_L2),
    Mutant("the log begins without L2's pages", "dirty_log.py", "        clear_bits(vm, stat, first, end, min_level, bits)\n    if not has_rmaps(vm.word):", "        clear_bits(vm, stat, first, end, min_level, bits)\n    if vm.word[VmWord.TDP_MMU] != ZERO:", L1_L2),
    Mutant("the log goes on without L2's pages", "dirty_log.py", "        clear_bits_of_mask(vm, stat, base, mask, bits)\n    if not has_rmaps(vm.word):", "        clear_bits_of_mask(vm, stat, base, mask, bits)\n    if vm.word[VmWord.TDP_MMU] != ZERO:", L1_L2),
    Mutant("L1 writes L2's tables unseen", "rmap.py", "flushes = vm.word[VmWord.TDP_MMU] != ZERO and clear_bits(", "flushes = False and clear_bits(", L1_L2),
    Mutant("L1 maps L2's tables writably", "fault.py", "        rights = ACC.X | ACC.U  #", "        pass  #", L1_L2),
    Mutant("roots of the guest that waits are kept too long", "roots.py", "    free_obsolete_own(vm, vcpu)\n    if is_nesting(vcpu.nested):", "    free_obsolete_own(vm, vcpu)\n    if False:", L1_L2),
    Mutant("the VMCB is not logged", "nested_guest.py", "        mark_dirty(vm, vm.mem.slots[number], gpa >> PAGE_SHIFT)", "        pass", L1_L2),
    Mutant("L2 goes on behind its exit", "drive.py", "while i < len(events) and events[i][\"op\"] != VMEXIT:", "while False:", L1_L2),
    Mutant("split: the table's role lacks X", "split.py", "child_role(role_of(vm, index), index, access, True)", "child_role(role_of(vm, index), index, access & np.uint64(6), True)", L1_L2),
    Mutant("split: the huge page's own X", "spte.py", "if access & ACC.X != ZERO and word[VmWord.NX_HUGE_PAGES] != ZERO:  # only", "if False:  # only", L1_L2),
    Mutant("split: X for all", "spte.py", "if access & ACC.X != ZERO and word[VmWord.NX_HUGE_PAGES] != ZERO:  # only", "if word[VmWord.NX_HUGE_PAGES] != ZERO:  # only", L1_L2),
    Mutant("split: new leaves are in no reverse map", "split.py", "        add_leaf(vm, stat, slot, index, gfn + i * pages_at(level), access, level)\n", "        pass\n", L1_L2),
    Mutant("split: what is there is made again", "split.py", "        if is_present(vm.spt[index]):", "        if False:", L1_L2),
    Mutant("split: no parent", "split.py", "    add_parent(vm, table, index)\n", "", L1_L2),
    Mutant("split: no quota", "split.py", "if not has_quota(vm.word) or not", "if not", L1_L2),
    Mutant("split: not at a clear", "dirty_log.py", "        split_eagerly(vm, stat, slot, first, last)\n", "", L1_L2),
    Mutant("split: without the TDP MMU too", "dirty_log.py", "if vm.word[VmWord.EAGER_PAGE_SPLIT] == ZERO or vm.word[VmWord.TDP_MMU] == ZERO:", "if vm.word[VmWord.EAGER_PAGE_SPLIT] == ZERO:", L1_L2),
    Mutant("told: a misconfiguration is kept, too", "floors.py", "        count(stat, Tally.MISCONFIGURATIONS, ONE)\n", "        count(stat, Tally.MISCONFIGURATIONS, ONE)\n        house.floor[Floor.SAVED] = access | LINEAR\n", TOLD),
    Mutant("told: a violation is not kept", "floors.py", "        house.floor[Floor.SAVED] = seen.qualification & (ACCESS | LINEAR)\n", "", TOLD),
    Mutant("told: stale and derived exchanged", "floors.py", "== STALE else", "!= STALE else", TOLD),
    Mutant("told: rights left out", "floors.py", " | (walk.qualification & QUALIFICATION.RIGHTS)", "", TOLD),
    Mutant("told: bits 8:7 always set", "floors.py", " | (saved & LINEAR)\n", " | LINEAR\n", TOLD),
    Mutant("told: a misconfiguration of L1 as a violation", "floors.py", "    if walk.reason == MISCONFIGURATION:\n", "    if False:\n", TOLD),
    Mutant("told: the emulator does not ask for R", "floors.py", "gfn, access | EPT.R)", "gfn, access)", TOLD),
    Mutant("told: the emulator is not asked", "floors.py", "    walk = walk_ept12(house, stat, log, Event.EMULATOR_WALK, gfn, access | EPT.R)\n    if not walk.ok:", "    if False:", TOLD),
    Mutant("told: L0 misses L1's write", "floors.py", "    house.l0.words[house.leaf02 + gfn] = ZERO  # L1's", "    # L1's", TOLD),
    Mutant("told: L1 grants W alone", "floors.py", "if rights & EPT.W != ZERO or (rights", "if (rights", TOLD),
    Mutant("told: L1 always has execute-only pages", "floors.py", "and house.floor[Floor.EXECUTE_ONLY] == ZERO)", "and False)", TOLD),
    Mutant("told: L1 always grants W with R", "floors.py", "    if rights & EPT.R != ZERO and house.floor[Floor.POLICY] == WRITE_WITH_READ:\n", "    if rights & EPT.R != ZERO:\n", TOLD),
    Mutant("told: the slow path knows the access", "floors.py", "handle_fault(house, stat, log, gfn, ZERO)", "handle_fault(house, stat, log, gfn, access)", TOLD),
    Mutant("told: old MMIO sptes are taken", "floors.py", "        if mmio_generation(spte) != ", "        if mmio_generation(spte) > ", TOLD),
    Mutant("told: the generation comes round, sptes stay", "floors.py", "            house.l0.words[house.leaf02 + gfn] = ZERO\n            gfn", "            gfn", TOLD),
    Mutant("told: half a state recurs", "floors.py", " and seen[at, 2] == saved", "", TOLD),
    Mutant("told: the loop from its first try", "qualification.py", """tries[int(rows[-1]["qualification"])]""", "tries[0]", TOLD),
    Mutant("EPT12: R is granted to all", "ept12.py", "((entry & EPT.R) << R_TO_U)", "GPTE64.U", EPT12),
    Mutant("EPT12: X is granted to all", "ept12.py", " | ((~entry & EPT.X) << X_TO_NX)", "", EPT12),
    Mutant("EPT12: flags whatever the EPTP says", "ept12.py", "(entry | (FLAGS & ~mmu.reg[Reg.EPT_FLAGS])) & FLAGS", "entry & FLAGS", EPT12),
    Mutant("EPT12: patterns not looked at", "ept12.py", "    return (mmu.reg[Reg.EPT_BAD] >> (entry & PATTERN)) & ONE != ZERO", "    return False", EPT12),
    Mutant("EPT12: D never set", "ept12.py", "if not set_flags(vm, vcpu, gpa, level, write):", "if not set_flags(vm, vcpu, gpa, level, False):", EPT12),
    Mutant("EPT12: clean pages are writable", "ept12.py", "            granted &= ~ACC.W  # so", "            pass  # so", EPT12),
    Mutant("EPT12: KVM's flags are not logged", "ept12.py", "            mark_dirty(vm, slot, table >> PAGE_SHIFT)\n            note_write(vm, vcpu, table)", "            note_write(vm, vcpu, table)", EPT12),
    Mutant("EPT12: rights of the last entry alone", "ept12.py", "            raw &= entry\n", "            raw = entry\n", EPT12),
    Mutant("EPT12: a misconfiguration with a qualification", "ept12.py", "        return MISCONFIGURATION, ZERO", "        return MISCONFIGURATION, own[VcpuWord.QUALIFICATION]", EPT12),
    Mutant("EPT12: every address is final", "ept12.py", "    if met & PFERR.GUEST_FINAL != ZERO:", "    if met & WHERE != ZERO:", EPT12),
    Mutant("EPT12: where the address was is not kept", "ept12.py", "    own[VcpuWord.EXIT_CODE] = pferr", "    pass", EPT12),
    Mutant("EPT12: a write is a read too", "hardware.py", "    if vm.word[VmWord.EPT] != ZERO and kind != ZERO:", "    if False:", EPT12),
    Mutant("EPT12: the emulator need not read", "guest.py", "    held = walk_for_kvm(vm, view, gpa, access | PFERR.U)", "    held = walk_for_kvm(vm, view, gpa, access)", EPT12),
    Mutant("EPT12: execute-only pages are read by the TLB", "hardware.py", "    if is_nested(vcpu.nested, vcpu.own) and answer & vm.word[VmWord.USER] == ZERO:", "    if False:", EPT12),
    Mutant("EPT12: asked for every entry of L2's tables", "hardware.py", "        if gpte & GPTE64.A == ZERO or (level == leaf_level and write and gpte & GPTE64.D == ZERO):\n            entry", "        if True:\n            entry", EPT12),
    Mutant("EPT12: the shortcut of a sync", "leaf.py", "    alike = alike and not is_ept12(vcpu.nested, vcpu.mmu)\n", "", EPT12),
    Mutant("EPT12: a sync keeps what has no rights", "leaf.py", " or (access == ZERO and is_ept12(vcpu.nested, vcpu.mmu)):", ":", EPT12),
    Mutant("EPT12: a sync leaves pages used", "leaf.py", "    return spte if word[VmWord.AD] != ZERO else mark_old(word, spte)", "    return spte", EPT12),
    Mutant("EPT12: roots with A and D always", "nested_guest.py", " | (ROLE.AD_DISABLED if nested.reg[Reg.EPT_FLAGS] == ZERO else ZERO)", "", EPT12),
    Mutant("EPT12: synced at every entry", "nested_guest.py", "        ask_one(vm, vcpu, FLUSH_GUEST)\n", "        ask_one(vm, vcpu, MMU_SYNC | FLUSH_GUEST)\n", EPT12),
    Mutant("EPT12: synced by flushes of addresses", "roots.py", "        if vm.word[VmWord.TDP] == ZERO:  # flushes do not", "        if True:  # flushes do not", EPT12),
    Mutant("EPT12: INVEPT leaves the current root", "nested_guest.py", "        drop_current(vm, inside)\n", "        pass\n", EPT12),
    Mutant("EPT12: INVEPT leaves kept roots", "nested_guest.py", "            drop_previous(vm, inside, np.uint64(i))", "            pass", EPT12),
    Mutant("EPT12: INVEPT drops other tables", "nested_guest.py", "    return eptp == ZERO or (pgd ^ eptp) & EPT.ADDR == ZERO", "    return True", EPT12),
    Mutant("EPT12: INVEPT by the whole EPTP", "nested_guest.py", "    return eptp == ZERO or (pgd ^ eptp) & EPT.ADDR == ZERO", "    return eptp == ZERO or pgd == eptp", EPT12),
    Mutant("EPT12: kept roots keep what was reflected", "shadow_fault.py", "        invalidate_same_ept(vm, vcpu, gva)", "        pass", EPT12),
    Mutant("EPT12: A and D need not agree", "machine.py", "        if bool(state.accessed) != self.kvm.ad:", "        if False:", EPT12),
)  # fmt: skip


def caught(mutant: Mutant, folder: Path) -> str:
    """Run the tests on the broken variant; the name of the first that failed, or an empty text."""
    for part in ("fastmmu", "tests", "bench"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    source = folder / "fastmmu" / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.file}"
    source.write_text(text.replace(mutant.old, mutant.new))
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(folder), "FASTMMU_SEED": str(SEED)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *mutant.tests]
    try:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return "a test that never ends"  # a walk that restarts for ever
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed and run.returncode == 1 else ""


@pytest.mark.skipif(not JIT, reason="the variants run interpreted already")
def test_a_few_broken_variants_are_caught(seed: int, tmp_path: Path) -> None:
    for number in np.random.default_rng(seed).choice(len(MUTANTS), 3, replace=False):
        assert caught(MUTANTS[number], tmp_path / str(number)), f"nothing noticed: {MUTANTS[number].name}"


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_every_broken_variant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    noticed = caught(mutant, tmp_path)
    assert noticed, f"nothing noticed: {mutant.name}"
    print(f"{mutant.name}: {noticed}")
