"""PyTorch's CPU arrays from a pool that reuses blocks of a size, in huge pages (`cpu/array_pool.cpp` says why).

The pool belongs to the process, so only commands install it; a program that imports the package keeps PyTorch's own allocator.
Where it cannot be built PyTorch's own serves, and one line says so.
"""

import ctypes
import functools
import subprocess
import sys

from shoal.kernels.cpu.build import build_with_torch, forced_level
from shoal.log import say


@functools.cache
def pool_arrays() -> ctypes.CDLL | None:
    """From now on arrays come from the pool; the library, or None where there is no pool. Call before large arrays are made."""
    if sys.platform != "linux" or forced_level() == "off":
        return None
    try:
        pool = ctypes.CDLL(str(build_with_torch("array_pool.cpp")))
    except (OSError, subprocess.SubprocessError) as error:
        say(f"no pool for arrays, PyTorch's own allocator serves (more memory): {type(error).__name__}")
        return None
    for count in (pool.shoal_pool_used, pool.shoal_pool_free):
        count.restype = ctypes.c_int64
    pool.shoal_pool_arrays()
    return pool
