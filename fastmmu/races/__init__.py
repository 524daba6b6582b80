"""The race explorer: the functions that ship, run as threads that take turns at every access to a shared word, in every order.

It needs the interpreter: `fastmmu races` starts itself without the JIT.
"""

RACES = ("aba", "tlb-flush", "dirty-bit", "log-clear", "zap", "split", "frozen", "split-twice", "accessed", "three")
"""Names of the programs, in the order in which they run: those of the mail of 2012 first."""
