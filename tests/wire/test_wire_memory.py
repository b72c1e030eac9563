from __future__ import annotations

import platform
import subprocess
import sys


def test_the_allocator_takes_the_settings() -> None:
    """In a process of its own: the settings last as long as the process."""
    code = "from branchline.wire.memory import keep_large_buffers; print(keep_large_buffers())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
