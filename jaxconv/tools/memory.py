"""``keep_memory``: keep freed memory in the process, instead of returning it to the system."""

import ctypes
import os
import warnings

# Options of glibc's mallopt, and their values. None has an effect without the others: threads other
# than the first allocate from arenas, which return what is freed; arrays of over 32 MiB are mapped
# and unmapped one by one; and free memory at the end of the heap is trimmed.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
OPTIONS = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}


def keep_memory() -> bool:
    """Keeps freed memory in this process, for its next arrays (Linux with glibc).

    JAX on CPU frees a program's intermediate arrays after each call, glibc returns them to the
    system, and the next call pays for every page anew: in MobileNetV2's training step a third of
    the time. Afterwards every array in this process, of any library, reuses what was freed before,
    and the process stays at its largest size, or more where arrays of varying sizes fragment it. It
    can't be undone. Call it before JAX computes anything: afterwards it is too late.

    Returns:
      Whether memory is kept from now on.

    Warns:
      UserWarning: it is too late; or there is nothing to do: the system is not Linux with glibc, or
        uses another allocator, such as jemalloc.

    Example:
      >>> import jaxconv
      >>> kept = jaxconv.keep_memory()  # first of all
    """
    problem = keep()
    if problem is not None:
        warnings.warn(f"jaxconv.keep_memory: {problem}", stacklevel=2)
    return problem is None


def keep() -> str | None:
    """``keep_memory`` without the warning, which is returned; None if memory is kept."""
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
        libc = ctypes.CDLL("libc.so.6")
    except (AttributeError, ValueError, OSError):  # Windows, macOS and musl in this order
        return "nothing to do: memory is kept on Linux with glibc only"
    if _address(libc.malloc) != _address(ctypes.CDLL(None).malloc):
        return "nothing to do: another allocator than glibc's is in use"
    if _arenas(libc) > 1:
        return "too late: other threads have allocated memory; call it before JAX computes anything"
    if not all(libc.mallopt(option, value) for option, value in OPTIONS.items()):
        return "nothing to do: glibc refuses the options"
    return None


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # pyright: ignore[reportArgumentType]


def _arenas(libc: ctypes.CDLL) -> int:
    """The number of arenas, by glibc's report: one until a second thread allocates memory."""
    libc.fdopen.restype = ctypes.c_void_p
    descriptor = os.memfd_create("malloc_info")
    try:
        stream = ctypes.c_void_p(libc.fdopen(os.dup(descriptor), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).count(b"<heap nr=")
    finally:
        os.close(descriptor)
