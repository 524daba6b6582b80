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
    Mutant("the fast path does not log", "fault.py", "                mark_dirty(vm, vm.mem.slots[number], gfn)\n            count(vcpu.stat, Counter.PF_FAST)", "                pass\n            count(vcpu.stat, Counter.PF_FAST)", KVM),
    Mutant("the fast path opens huge pages", "fault.py", "                return Outcome.INVALID  # only the first of its pages would be logged", "                pass", KVM),
    Mutant("stale MMIO sptes answer", "fault.py", " or mmio_generation(spte) != generation & MAX_GENERATION:", ":", KVM),
    Mutant("read-only memslots mapped for writes", "fault.py", "elif pferr & PFERR.W != ZERO and is_readonly(vm.mem.slots[number]):", "elif False:", KVM),
    Mutant("prefetch while logging", "fault.py", "if logs_dirty(slot) or is_readonly(slot) or gfn", "if is_readonly(slot) or gfn", KVM),
    Mutant("prefetch over the end of a memslot", "fault.py", ' or gfn + (end - start) > slot["base"] + slot["pages"]:', ":", KVM),
    Mutant("prefetch goes on behind a run it cannot take", "fault.py", "            if not prefetch_run(vm, vcpu, start, at):\n                return", "            prefetch_run(vm, vcpu, start, at)", KVM),
    Mutant("huge pages while logging", "fault.py", "if number == NO_SLOT or logs_dirty(vm.mem.slots[number]):", "if number == NO_SLOT:", KVM),
    Mutant("a huge page dropped without a flush", "fault.py", "        drop_leaf(vm, vcpu.stat, index)\n        flush_remote(vm.word, vcpu.stat)", "        drop_leaf(vm, vcpu.stat, index)", KVM),
    Mutant("tables give way under NX", "fault.py", "return vm.word[VmWord.NX_HUGE_PAGES] != ZERO and level > ONE and level == goal and is_table(spte, level)", "return False", KVM),
    Mutant("huge pages executable under NX", "spte.py", " and not (level > ONE and word[VmWord.NX_HUGE_PAGES] != ZERO)", "", KVM),
    Mutant("eight bits of generation", "spte.py", "| low | high |", "| low |", KVM),
    Mutant("logging takes MMU_WRITABLE", "dirty_log.py", "        clear_slot_bits(vm, slot, ONE, W)", "        clear_slot_bits(vm, slot, ONE, W | vm.word[VmWord.MMU_WRITABLE])", KVM),
    Mutant("no flush when logging begins", "dirty_log.py", "        clear_slot_bits(vm, slot, ONE, W)\n    flush_remote(vm.word, stat)", "        clear_slot_bits(vm, slot, ONE, W)", KVM),
    Mutant("GET leaves the bitmap", "dirty_log.py", "mask = exchange(vm.slot_words, at, ZERO)", "mask = vm.slot_words[at]", KVM),
    Mutant("CLEAR leaves huge pages MMU-writable", "dirty_log.py", "bits = W | vm.word[VmWord.MMU_WRITABLE]", "bits = W", KVM),
    Mutant("huge pages do not come back", "dirty_log.py", 'vm.word[VmWord.MAX_LEVEL]) >= level:', 'vm.word[VmWord.MAX_LEVEL]) > level:', KVM),
    Mutant("the generation advances by one", "host.py", "ADDRESS_SPACES = np.uint64(2)", "ADDRESS_SPACES = np.uint64(1)", KVM),
    Mutant("nothing zapped when the generation wraps", "host.py", "~(ADDRESS_SPACES - ONE) == ZERO:", "~(ADDRESS_SPACES - ONE) == ONE:", KVM),
    Mutant("an unmap without a flush", "host.py", "    if zapped:\n        flush_remote(vm.word, stat)", "    if zapped:\n        pass", KVM),
    Mutant("deleting a memslot zaps nothing", "host.py", "    zap_all_fast(vm, stat)\n    if logs_dirty", "    if logs_dirty", KVM),
    Mutant("roots in use recycled", "shadow.py", '        if vm.page[table]["roots"] == NONE:\n            zap(', "        if True:\n            zap(", KVM),
    Mutant("the newest recycled", "shadow.py", "    zapped = ZERO\n    table = vm.word[VmWord.OLDEST]", "    zapped = ZERO\n    table = vm.word[VmWord.NEWEST]", KVM),
    Mutant("a leaf dropped without its reverse map", "shadow.py", "    rmap_set(vm, gfn_of_entry(vm, index), level, ZERO)\n", "", KVM),
    Mutant("leaves of a freed table still counted", "tdp.py", "            count_leaf(stat, level, -1)\n        index += ONE", "            pass\n        index += ONE", KVM),
    Mutant("an empty range splits nothing", "tdp.py", "        if frame_at(gfn, level) >= end:", "        if gfn >= end:", KVM),
    Mutant("every TLB entry dirty", "hardware.py", "level, dirty, is_executable(word, spte))", "level, True, is_executable(word, spte))", STREAMS),
    Mutant("tables only read", "hardware.py", "        table_access |= PFERR.W\n    while True", "        pass\n    while True", STREAMS),
    Mutant("no page-modification logging", "hardware.py", "            log_modification(vm, vcpu, gfn)", "            pass", STREAMS),
    Mutant("INVLPG forgets nothing", "tlb.py", "                if (tag & PAGE_NUMBER) >> shift == page >> shift:", "                if False:", STREAMS),
    Mutant("a flush forgets nothing", "tlb.py", "    epoch = tlb[last, 0, 0] + ONE", "    epoch = tlb[last, 0, 0]", STREAMS),
    Mutant("requested flushes counted, not done", "guest.py", "            count(vcpu.stat, Counter.TLB_FLUSH)\n            flush(vcpu.tlb)", "            count(vcpu.stat, Counter.TLB_FLUSH)", STREAMS),
    Mutant("requests served once", "guest.py", "    while vm.word[number] != ZERO:", "    if vm.word[number] != ZERO:", KVM),
    Mutant("the emulator's A bits not logged", "guest.py", "        log_guest_bits(vm, vcpu, gva, walk.level, access & PFERR.W != ZERO)\n", "", STREAMS),
    Mutant("keys not asked on a TLB hit", "tlb.py", "denied = denied or key_fault", "denied = denied or False and key_fault", STREAMS),
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
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)
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
