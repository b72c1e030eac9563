"""Memory for messages of the size of a KV frame: bytes that are filled in place, and the C library's allocator.

By default glibc maps each large buffer freshly from the kernel and gives it back at once, so every frame pays for
page faults and zeroing at each copy. Keeping such memory in the heap made hand-offs over loopback two to four
times as fast (1 MiB frames, two processes).
"""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_PyBytes_FromStringAndSize = ctypes.pythonapi.PyBytes_FromStringAndSize
_PyBytes_FromStringAndSize.restype = ctypes.py_object
_PyBytes_FromStringAndSize.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_PyBytes_AsString = ctypes.pythonapi.PyBytes_AsString
_PyBytes_AsString.restype = ctypes.c_void_p
_PyBytes_AsString.argtypes = (ctypes.py_object,)


def fresh_bytes(size: int) -> tuple[bytes, memoryview]:
    """New bytes and a writable view of them, to be filled and released before anybody else sees the bytes.

    gRPC sends `bytes` alone, and Python itself can make them only from something that is there: a copy of every frame.
    CPython's own way for C code is to make them without contents and to fill them in, as here. The view doesn't
    keep the bytes alive.
    """
    made = _PyBytes_FromStringAndSize(None, size)
    array = (ctypes.c_char * size).from_address(_PyBytes_AsString(made))
    return made, memoryview(array).cast("B")


def keep_large_buffers() -> bool:
    """Makes this process keep freed buffers of up to 32 MiB for the next frames. False where there is no glibc.

    For the entry points of workers, before their threads start: it applies to the whole process, whose memory no
    longer shrinks below its peak. The same as the environment's MALLOC_MMAP_THRESHOLD_ and its kin, which
    only work when set before the process starts.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has no mallopt
        return False
    settings = (
        (_M_MMAP_THRESHOLD, 32 * 1024 * 1024),  # the most that glibc takes
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 1024 * 1024),
    )
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
