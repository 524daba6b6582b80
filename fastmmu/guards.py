"""What keeps the changes of shared words right, each with a name: all True in what ships.

Compiled code holds them as constants, so that nothing is left of them. Without the JIT `fastmmu races` takes one out at a time, and
shows the order of steps in which it is missed.
"""

DIRECT_ONLY = True  # the fast path is for direct maps: there the place of an spte tells its gfn (facts 6.3)
FLUSH_IF_MMU_WRITABLE = True  # write protection flushes if the fast path could have set W, whatever W was before (facts 6.4)
ATOMIC_CLEAR = True  # an spte that may change without the mmu lock is removed by an exchange (facts 6.5)
FAST_EXCHANGE = True  # the fast path sets W only in the entry that it has read (facts 6.2)
FLUSH_WAITS = True  # who asks for a flush waits until each vCPU has left the guest
SPLIT_EXCHANGE = True  # a huge page gives way to a table only if it is still the one that was copied
FROZEN_ZAP = True  # what is zapped under the mmu lock for reading is frozen until it is flushed (facts 10.4)
GPTE_EXCHANGE = True  # A and D go only into the entry that the walk has read (facts 1.6)
