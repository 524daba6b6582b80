"""The oracle: slow, obvious, written from the manuals. Python ints, dicts and dataclasses; it shares only layouts with the
kernels (`bits`, and the register names of `paging.Cpu`)."""
