"""Calling a kernel: tensors become pointers, whole numbers 64-bit integers, None a null pointer, ctypes values themselves."""

import ctypes
from typing import Any

from torch import Tensor

from shoal.kernels.cpu.build import library


def call(name: str, *arguments: Any) -> None:
    """Run the kernel `name`. The caller has seen to it that the library is there and that sizes and layouts are right."""
    getattr(library(), name)(*map(_c_value, arguments))


def _c_value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
