"""How the C library's allocator treats buffers the size of a KV frame.

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
