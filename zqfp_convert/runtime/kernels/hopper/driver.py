"""Launches compiled kernels through the CUDA driver, on PyTorch's stream."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch

from zqfp_convert.errors import ZqfpError
from zqfp_convert.runtime.kernels.hopper.compiler import compile_kernel

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class DriverError(ZqfpError):
    """The CUDA driver refuses a kernel."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, name: str, doing: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(
            name,
            f"{(text.value or b'unknown error').decode()} ({code}) while {doing}",
            needed="a GPU of compute capability 9.0 in working order",
            do="ZQFP_PATH=reference goes on without this kernel.",
        )


def _enter() -> None:
    """Make PyTorch's context current in this thread: in a new one none is."""
    driver, context, device = _driver(), ctypes.c_void_p(), ctypes.c_int()
    for code in (
        driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()),
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        driver.cuCtxSetCurrent(context),
    ):
        _check(code, "CUDA", "entering its context")


@contextmanager
def _capture_allowed() -> Iterator[None]:
    """While a CUDA graph is captured, let this thread do what no graph can hold."""
    mode = ctypes.c_int(RELAXED)
    _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class Kernel:
    """A kernel on one device. Takes one structure by value."""

    def __init__(self, name: str, constants: Mapping[str, int], shared: int = 0) -> None:
        """Compile (or take from the cache) and load on the current device.

        `shared`: bytes of dynamic shared memory, at most.
        """
        self.name, self.shared = name, shared
        image = compile_kernel(name, constants)
        module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        driver = _driver()
        _enter()
        with _capture_allowed():
            _check(driver.cuModuleLoadData(ctypes.byref(module), image), name, "loading")
        code = driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
        _check(code, name, "loading")
        if shared:
            code = driver.cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared)
            _check(code, name, f"asking for {shared} bytes of shared memory")

    def launch(
        self,
        problem: ctypes.Structure,
        grid: tuple[int, int],
        threads: int,
        cluster: int = 1,
        overlap: bool = True,
        shared: int | None = None,
    ) -> None:
        """Enqueue on the current stream.

        Args:
            problem: the kernel's argument.
            grid: blocks.
            threads: in a block.
            cluster: blocks in a cluster, along the first extent of the grid.
            overlap: it may start before the kernel ahead has ended, and waits for it by itself.
            shared: bytes of dynamic shared memory, where it is not the most.
        """
        attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            attributes[count].id = CLUSTER
            attributes[count].value[0] = cluster
            attributes[count].value[1] = attributes[count].value[2] = 1
            count += 1
        if overlap:
            attributes[count].id = OVERLAP
            attributes[count].value[0] = 1
            count += 1
        launch = _Launch(
            (grid[0], grid[1], 1),
            (threads, 1, 1),
            self.shared if shared is None else shared,
            torch.cuda.current_stream().cuda_stream,
            attributes,
            count,
        )
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
        code = _driver().cuLaunchKernelEx(ctypes.byref(launch), self._function, arguments, None)
        if code == INVALID_CONTEXT:
            _enter()
            code = _driver().cuLaunchKernelEx(ctypes.byref(launch), self._function, arguments, None)
        _check(code, self.name, "launching")
