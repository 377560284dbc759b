"""CUDA C++ of ours, compiled when it is first called by NVRTC: it comes with CUDA builds of torch, as on Linux do the bindings
(cuda-bindings) that it is called by. No toolkit is needed.

For what Triton cannot say: tiles whose sizes are no powers of two, and what goes on in which warp.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3m_like.core.errors import UserError


@functools.cache
def has_nvrtc() -> bool:
    """Whether sources can be compiled here: the bindings are there, and find the library."""
    try:
        nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
        return not int(nvrtc.nvrtcVersion()[0])
    except (ImportError, RuntimeError, OSError):
        return False


def compiled(source: str, architecture: str, options: Sequence[str]) -> bytes:
    """The machine code of ``source`` for ``architecture`` ("sm_90a").

    Raises:
        UserError: it does not compile, with the compiler's words.
    """
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        flags = [flag.encode() for flag in (f"--gpu-architecture={architecture}", "--std=c++17", *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if int(status):
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise UserError(f"a CUDA kernel does not compile (torch {torch.__version__}):\n{log.decode(errors='replace')}")
        code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Kernel:
    """One function of compiled code on the current device.

    Args:
        code: of ``compiled``.
        name: of the function, ``extern "C"``.
        shared: bytes of shared memory of a block.
    """

    def __init__(self, code: bytes, name: str, shared: int) -> None:
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._enter()
        self._module = _checked(self._driver.cuModuleLoadData(code))
        self._function = _checked(self._driver.cuModuleGetFunction(self._module, name.encode()))
        self._shared = shared
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(self._driver.cuFuncSetAttribute(self._function, attribute, shared))

    def __call__(self, blocks: int, threads: int, *arguments: Tensor | int) -> None:
        """Launch on the current stream; ``arguments``: pointers (of tensors) and ints."""
        self._enter()
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        kinds = tuple(ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_int for a in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        sizes = (blocks, 1, 1, threads, 1, 1, self._shared)
        _checked(self._driver.cuLaunchKernel(self._function, *sizes, stream, (values, kinds), 0))

    def _enter(self) -> None:
        """Make the device's context current in this thread: autograd's may not have called CUDA yet."""
        if not int(_checked(self._driver.cuCtxGetCurrent())):
            device = _checked(self._driver.cuDeviceGet(torch.cuda.current_device()))
            _checked(self._driver.cuCtxSetCurrent(_checked(self._driver.cuDevicePrimaryCtxRetain(device))))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of CUDA returned besides its status."""
    status, *rest = result
    if int(status):
        raise RuntimeError(f"CUDA: {status!r}")
    return rest[0] if rest else None
