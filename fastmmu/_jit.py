"""The only importer of Numba: the `@kernel` decorator, atomic instructions and prefetch.

Everything else in the package is plain Python that also runs with `NUMBA_DISABLE_JIT=1`; there the atomics below are their
plain twins.
"""

from __future__ import annotations

import hashlib
import operator
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from platform import python_implementation, python_version

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic, overload

# Settings that change the code Numba makes. Bounds checking is missing from Numba's own cache key: a warm cache would silently
# ignore it, and a checked build would be loaded by later, timed runs.
CODE_SETTINGS = (
    "BOUNDSCHECK", "CPU_FEATURES", "CPU_NAME", "DEBUGINFO_DEFAULT", "DEBUG_NRT", "DISABLE_INTEL_SVML", "DISABLE_JIT",
    "ENABLE_AVX", "ENABLE_PROFILING", "EXTEND_VARIABLE_LIFETIMES", "FULL_TRACEBACKS", "JIT_COVERAGE", "LLVM_REFPRUNE_FLAGS",
    "LLVM_REFPRUNE_PASS", "LOOP_VECTORIZE", "NRT_STATS", "OPT", "PARFOR_MAX_TUPLE_SIZE", "SLP_VECTORIZE",
)  # fmt: skip
KEPT_DIGESTS = 6
"""How many cache directories survive pruning, most recently used first: two checkouts of three builds each."""

JIT = not config.DISABLE_JIT


def source_digest() -> str:
    """Name of the compiled code's cache: sources of the package, versions, and every setting that changes code."""
    digest = hashlib.blake2b(digest_size=10)
    package = Path(__file__).parent
    for source in sorted(package.rglob("*.py")):
        digest.update(str(source.relative_to(package)).encode() + b"\0" + source.read_bytes() + b"\0")
    versions = (python_implementation(), python_version(), numba.__version__, llvmlite.__version__, np.__version__)
    settings = [f"{name}={getattr(config, name, None)}" for name in CODE_SETTINGS]
    digest.update("\0".join([*versions, *settings]).encode())
    return digest.hexdigest()


def _cache_roots() -> Iterator[Path]:
    """The user's cache folder; where that cannot be written, a private folder among the temporary files."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    yield Path(home) / "fastmmu"
    yield Path(tempfile.gettempdir()) / f"fastmmu-{os.getuid()}"


def _prune(root: Path, keep: Path) -> None:
    """Delete all but the most recently used digests, `keep` among those that stay."""
    digests = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [path for path in digests if path != keep][KEPT_DIGESTS - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def cache_directory() -> Path | None:
    """Directory of this build's compiled kernels, made and marked as used now; None where nothing can be written."""
    name = source_digest()
    for root in _cache_roots():
        path = root / name
        try:
            new = not path.is_dir()
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.stat().st_uid != os.getuid() or not os.access(path, os.W_OK):
                continue  # somebody else's folder of that name: compiled code is not loaded from it
            os.utime(path, (time.time(), time.time()))
            if new:
                _prune(root, path)
        except OSError:
            continue
        return path
    return None


CACHE_DIRECTORY = cache_directory() if JIT else None


@contextmanager
def _numba_cache(path: Path | None) -> Iterator[None]:
    """Point Numba's cache at `path` while one function is decorated; the user's own setting is put back."""
    before = config.CACHE_DIR
    if path is not None:
        config.CACHE_DIR = str(path)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def kernel(function: Callable | None = None, *, inline: bool = False) -> Callable:
    """Compile a function in nopython mode, cached on disk, without the GIL and without reference counts.

    `_nrt=False`: with reference counting, each array passed to a function that is not inlined costs two locked instructions:
    198 ns against 2.7 ns per walk for a tuple of ten arrays. It also makes allocation inside a kernel a compile error, which
    is a rule of this package; a kernel never returns an array.

    `inline=True` is for the few large functions on the path of every access, where LLVM's own cost model says no: passing
    eight arrays by value, seven words each, to a walk that is not inlined costs 27 ns against 4 ns.
    """
    if function is None:
        return lambda function: kernel(function, inline=inline)
    with _numba_cache(CACHE_DIRECTORY):
        options = {"cache": CACHE_DIRECTORY is not None, "nogil": True, "error_model": "numpy", "_nrt": False}
        return numba.njit(forceinline=inline, **options)(function)


def inner(function: Callable | None = None, *, inline: bool = False) -> Callable:
    """Compile a function that only kernels call: as `kernel`, without a Python entry and without a place of its own on the disk.

    For a tree of functions over wide state that is a third of the compile time, 18 s against 29 s for 190. From Python it raises
    TypeError, where the JIT is on.
    """
    if function is None:
        return lambda function: inner(function, inline=inline)
    options = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher = numba.njit(forceinline=inline, **options)(function)
    if JIT:
        dispatcher.__class__ = _Inner  # else a call would jump to an entry that does not exist
    return dispatcher


def unless_none(function: Callable) -> Callable:
    """A function of two arguments for kernels to call: None where the first is None, decided when the caller is compiled.

    Numba prunes what stands behind `if x is None` where x is None, but types both ways where it is not: a function cannot return
    None in the one case and a tuple in the other.
    """
    if not JIT:
        return lambda first, second: None if first is None else function(first, second)

    def choose(first, second):
        """Where the JIT is on, its overload takes its place."""

    @overload(choose, jit_options={"nogil": True, "error_model": "numpy", "_nrt": False})
    def choose_by_type(first, second):
        if isinstance(first, types.NoneType):
            return lambda first, second: None
        return lambda first, second: function(first, second)

    return choose


class _Inner(CPUDispatcher):
    """A dispatcher that refuses to be called from Python."""

    def __call__(self, *args: object) -> None:
        raise TypeError(f"{self.py_func.__name__}: a part of a kernel, expected to be called by kernels alone")


# --- atomics ---------------------------------------------------------------------------------------------------------
# Each takes (array, index, ...): a one-dimensional array of uint64 or uint32 and an index into it.


def _element(context, builder, signature, args):
    """Pointer to `array[index]`, bounds-checked in the checked build."""
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    index = context.cast(builder, args[1], signature.args[1], types.intp)
    return cgutils.get_item_pointer(context, builder, array_type, array, [index], boundscheck=context.enable_boundscheck)


def _operand(context, builder, signature, args, position):
    return context.cast(builder, args[position], signature.args[position], signature.args[0].dtype)


if JIT:

    @intrinsic
    def cmpxchg(typingctx, array, index, expected, desired):
        """`lock cmpxchg`: store `desired` if the element equals `expected`; returns what was seen."""

        def codegen(context, builder, signature, args):
            pointer = _element(context, builder, signature, args)
            old, new = (_operand(context, builder, signature, args, i) for i in (2, 3))
            pair = builder.cmpxchg(pointer, old, new, "seq_cst", "seq_cst")
            return builder.extract_value(pair, 0)

        return array.dtype(array, index, expected, desired), codegen

    def _read_modify_write(operation: str):
        def typing(typingctx, array, index, value):
            def codegen(context, builder, signature, args):
                pointer = _element(context, builder, signature, args)
                return builder.atomic_rmw(operation, pointer, _operand(context, builder, signature, args, 2), "seq_cst")

            return array.dtype(array, index, value), codegen

        return intrinsic(typing)

    fetch_or = _read_modify_write("or")
    fetch_and = _read_modify_write("and")
    fetch_add, fetch_sub = _read_modify_write("add"), _read_modify_write("sub")
    exchange = _read_modify_write("xchg")

    @intrinsic
    def load(typingctx, array, index):
        """Atomic load (relaxed): read exactly once, never torn, never read again behind the caller's back."""

        def codegen(context, builder, signature, args):
            pointer = _element(context, builder, signature, args)
            return builder.load_atomic(pointer, "monotonic", array.dtype.bitwidth // 8)

        return array.dtype(array, index), codegen

    @intrinsic
    def store(typingctx, array, index, value):
        """Atomic store (release): everything written before it is seen by whoever sees it."""

        def codegen(context, builder, signature, args):
            pointer = _element(context, builder, signature, args)
            builder.store_atomic(_operand(context, builder, signature, args, 2), pointer, "release", array.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(array, index, value), codegen

    @intrinsic
    def pause(typingctx):
        """Tell the processor that this is a loop which waits for another one."""

        def codegen(context, builder, signature, args):
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause")
            builder.call(function, [])
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def cycles(typingctx):
        """The processor's time-stamp counter."""

        def codegen(context, builder, signature, args):
            word = ir.IntType(64)
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, []), "llvm.readcyclecounter")
            return builder.call(function, [])

        return types.uint64(), codegen

    @intrinsic
    def likely(typingctx, condition):
        """The condition, and a hint that it holds nearly always: registers and the straight way are for that case."""

        def codegen(context, builder, signature, args):
            bit = ir.IntType(1)
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(bit, [bit, bit]), "llvm.expect.i1")
            return builder.call(function, [args[0], bit(1)])

        return types.boolean(types.boolean), codegen

    @intrinsic
    def prefetch(typingctx, array, index):
        """Ask for the cache line of `array[index]`, to be read soon; never faults."""

        def codegen(context, builder, signature, args):
            array_value = context.make_array(array)(context, builder, args[0])
            offset = context.cast(builder, args[1], index, types.intp)
            pointer = cgutils.get_item_pointer(context, builder, array, array_value, [offset])
            byte = ir.IntType(8).as_pointer()
            word = ir.IntType(32)
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0"
            )
            # read access, keep in all cache levels, data cache
            builder.call(function, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])
            return context.get_dummy_value()

        return types.void(array, index), codegen

else:
    # The race explorer puts arrays of its own in the place of NumPy's: for these each of the following is one step. For others it
    # is one by this lock: between a read and a write the interpreter may switch threads.
    one_at_a_time = threading.Lock()

    def cmpxchg(array, index, expected, desired):
        """Plain twin of the atomic instruction."""
        if type(array) is not np.ndarray:
            return array.cmpxchg(index, expected, desired)
        with one_at_a_time:
            seen = array[index]
            if seen == expected:
                array[index] = desired
        return seen

    def _read_modify_write(operation):
        def modify(array, index, value):
            """Plain twin of the atomic instruction."""
            if type(array) is not np.ndarray:
                return array.modify(index, value, operation)
            with one_at_a_time:
                seen = array[index]
                array[index] = operation(seen, value)
            return seen

        return modify

    fetch_or, fetch_and = _read_modify_write(operator.or_), _read_modify_write(operator.and_)
    fetch_add, fetch_sub = _read_modify_write(operator.add), _read_modify_write(operator.sub)
    exchange = _read_modify_write(lambda seen, value: value)
    waiting: list[Callable[[], None]] = []  # what the race explorer does where a thread waits for another one

    def load(array, index):
        """Plain twin of the atomic instruction."""
        return array[index]

    def store(array, index, value):
        """Plain twin of the atomic instruction."""
        if type(array) is not np.ndarray:
            array[index] = value
            return
        with one_at_a_time:
            array[index] = value

    def pause():
        """Nothing to do without compiled code, but for the race explorer."""
        for wait in waiting:
            wait()

    def cycles():
        """Nanoseconds instead."""
        return np.uint64(time.perf_counter_ns())

    def likely(condition):
        """The condition."""
        return condition

    def prefetch(array, index):
        """Nothing to do without compiled code."""
