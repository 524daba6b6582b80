/* The same walk as a plain C loop: 4-level tables, every table inside memory, permission with the rights of all levels, accessed and
   dirty bits already set. gpas[i] is 0 where the walk faults, or where a bit would have to be set. */
#include <stddef.h>
#include <stdint.h>

#define P 0x1ull
#define W 0x2ull
#define U 0x4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define NX 0x8000000000000000ull
#define ADDR 0x000ffffffffff000ull
#define WRITE 0x2ull
#define USER 0x4ull
#define FETCH 0x10ull

void walk_all(const uint64_t *words, uint64_t size, uint64_t cr3, uint64_t reserved, uint64_t access, const uint64_t *gvas,
              size_t count, uint64_t *gpas)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t gva = gvas[i], table = cr3 & ADDR, rights = ~0ull, gpte = 0;
        int level, fault = 0;
        for (level = 4;; level--) {
            if (table >= size) {
                fault = 1;
                break;
            }
            gpte = words[(table >> 3) + ((gva >> (3 + 9 * level)) & 511)];
            if (!(gpte & P) || (gpte & reserved)) {
                fault = 1;
                break;
            }
            rights &= gpte ^ NX;
            if (level == 1 || (gpte & PS))
                break;
            table = gpte & ADDR;
        }
        if (!fault) {
            fault |= (access & WRITE) && !(rights & W);
            fault |= (access & USER) && !(rights & U);
            fault |= (access & FETCH) && !(rights & NX);
            fault |= !(rights & A) || ((access & WRITE) && !(gpte & D));
        }
        uint64_t offset = (1ull << (3 + 9 * level)) - 1;
        gpas[i] = fault ? 0 : (gpte & ADDR & ~offset) | (gva & offset);
    }
}

/* The walk in two dimensions, likewise: EPT without A and D, 4 levels in both, pages of any size in both. hpas[i] is 0 where it does not
   come to an end. */
#define EPT_RWX 0x7ull

static int ept_walk(const uint64_t *words, uint64_t size, uint64_t root, uint64_t reserved, uint64_t needed, uint64_t gpa, uint64_t *hpa)
{
    uint64_t table = root, rights = ~0ull, entry;
    int level;
    for (level = 4;; level--) {
        if (table >= size)
            return 0;
        entry = words[(table >> 3) + ((gpa >> (3 + 9 * level)) & 511)];
        if (!(entry & EPT_RWX) || (entry & reserved) || (entry & 3) == 2)
            return 0;
        rights &= entry;
        if (level == 1 || (entry & PS))
            break;
        table = entry & ADDR;
    }
    if ((rights & needed) != needed || ((0x8cu >> ((entry >> 3) & 7)) & 1))
        return 0;
    uint64_t offset = (1ull << (3 + 9 * level)) - 1;
    *hpa = (entry & ADDR & ~offset) | (gpa & offset);
    return 1;
}

void walk_nested(const uint64_t *words, uint64_t size, uint64_t cr3, uint64_t eptp, uint64_t reserved, uint64_t access,
                 const uint64_t *gvas, size_t count, uint64_t *hpas)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t gva = gvas[i], table = cr3 & ADDR, rights = ~0ull, gpte = 0, at = 0;
        int level, fault = 0;
        for (level = 4;; level--) {
            uint64_t gpa = table + 8 * ((gva >> (3 + 9 * level)) & 511);
            if (!ept_walk(words, size, eptp & ADDR, reserved, 1, gpa, &at) || at >= size) {
                fault = 1;
                break;
            }
            gpte = words[at >> 3];
            if (!(gpte & P) || (gpte & reserved)) {
                fault = 1;
                break;
            }
            rights &= gpte ^ NX;
            if (level == 1 || (gpte & PS))
                break;
            table = gpte & ADDR;
        }
        if (!fault) {
            fault |= (access & WRITE) && !(rights & W);
            fault |= (access & USER) && !(rights & U);
            fault |= (access & FETCH) && !(rights & NX);
            fault |= !(rights & A) || ((access & WRITE) && !(gpte & D));
        }
        uint64_t offset = (1ull << (3 + 9 * level)) - 1;
        uint64_t gpa = (gpte & ADDR & ~offset) | (gva & offset);
        if (fault || !ept_walk(words, size, eptp & ADDR, reserved, access & WRITE ? 2 : access & FETCH ? 4 : 1, gpa, &at))
            at = 0;
        hpas[i] = at;
    }
}

/* The bound: one random 8-byte read for each walk. */
void read_all(const uint64_t *words, const uint64_t *index, size_t count, uint64_t *values)
{
    for (size_t i = 0; i < count; i++)
        values[i] = words[index[i]];
}
