"""The three ways to check a guest mapping's permission (see `fastmmu.access_checks`), in plain Python from the mail of 2007."""

from __future__ import annotations

from collections import Counter

from fastmmu.reference.walk import ADDR, PFERR_P, PFERR_U, PFERR_W, PS, A, Memory, P, Translation, U, W, Walker


def grants(entry: int, access: int, write_protect: bool) -> bool:
    """What the caller looked at before the patch, and the patch looks at on each level."""
    if access & PFERR_U and not entry & U:
        return False
    return not access & PFERR_W or bool(entry & W) or not (access & PFERR_U or write_protect)


def history_walk(
    memory: Memory, cr3: int, gva: int, access: int, *, check: bool, write_protect: bool
) -> tuple[list[int], int, int]:
    """(entries gone through, error code or -1, A bits set); sets A on the way down, level by level."""
    table, entries, accessed = cr3 & ADDR, [], 0
    for level in (4, 3, 2, 1):
        gpa = table + 8 * (gva >> (12 + 9 * (level - 1)) & 511)
        entry = memory.words.get(gpa, 0) if memory.kind(table) else 0
        bits = access & (PFERR_W | PFERR_U)
        if not entry & P:
            return entries, bits, accessed
        if check and not grants(entry, access, write_protect):
            return entries, PFERR_P | bits, accessed
        if not entry & A:
            memory.words[gpa] = entry | A
            accessed += 1
        entries.append(entry)
        if entry & PS:
            break
        table = entry & ADDR
    return entries, -1, accessed


def run(method: str, walker: Walker, cr3: int, accesses: list[tuple[int, int]], truth: list[Translation]) -> Counter[str]:
    """All accesses by one method; counters by the names of `fastmmu.access_checks.Check`."""
    counters: Counter[str] = Counter()
    memory, write_protect = walker.memory, walker.write_protect
    for (gva, access), right in zip(accesses, truth, strict=True):
        counters["accesses"] += 1
        counters["exits"] += 1
        counters["walks"] += 1
        if method == "once":
            found = walker.walk(cr3, gva, access)
            code, accessed = (-1 if found.ok else found.pferr), 0
        else:
            entries, code, accessed = history_walk(
                memory, cr3, gva, access, check=method == "per-level", write_protect=write_protect
            )
            if method == "after-walk" and code < 0 and not all(grants(entry, access, write_protect) for entry in entries):
                counters.update(("refaults", "exits", "walks"))
                counters["endless"] += grants(entries[-1], access, write_protect)
                code = PFERR_P | access & (PFERR_W | PFERR_U)
        counters["accessed_by_failing"] += accessed * (not right.ok)
        counters["injected"] += code >= 0
        counters["wrong_outcomes"] += (code < 0) != right.ok
        counters["wrong_codes"] += code >= 0 and not right.ok and code != right.pferr
    return counters
