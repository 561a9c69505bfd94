"""CUDA C++ to machine code for Hopper with NVRTC, the compiler that PyTorch's CUDA wheels bring.

What has been compiled once is kept under `~/.cache/zqfp-convert/kernels` (`XDG_CACHE_HOME` is
honoured), by a digest of all that went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch

from zqfp_convert.errors import ZqfpError

ARCHITECTURE = "sm_90a"
SOURCES = Path(__file__).parent
OPERATIONS = "wgmma.cuh"  # written by `operations`


class CompilerError(ZqfpError):
    """NVRTC is missing, or does not take the source."""


def compile_kernel(name: str, constants: Mapping[str, int]) -> bytes:
    """The machine code of `<name>.cu` with constants defined.

    Raises:
        CompilerError: there is no NVRTC, or it reports errors.
    """
    headers = {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}
    if "TOKENS" in constants:
        headers[OPERATIONS] = operations(constants["TOKENS"])
    source = (SOURCES / f"{name}.cu").read_text()
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17"]
    options += [f"-D{key}={int(value)}" for key, value in sorted(constants.items())]
    digest = hashlib.sha256()
    for part in (*map(str, version()), source, *headers.values(), *options):
        digest.update(part.encode() + b"\0")
    kept = cache_folder() / f"{name}-{digest.hexdigest()[:32]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        code = _compile(name, source, headers, options)
    _keep(kept, code)
    return code


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "zqfp-convert" / "kernels"


def _keep(path: Path, code: bytes) -> None:
    """Store under the final name only when whole; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass


def operations(tokens: int) -> str:
    """The header with wgmma for 64 features by `tokens`, operand A in registers.

    `wgmma_e4m3` multiplies 32 columns of E4M3, `wgmma_bf16` 16 of bfloat16; both add to float32.
    """
    count = tokens // 2  # sums for each thread
    sums = ", ".join(f"%{i}" for i in range(count))
    weights = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    text = '#pragma once\n#include "hardware.cuh"\n'
    for kind, columns, transposed in (("e4m3", 32, ""), ("bf16", 16, ", 0")):
        text += (
            f"DEVICE void wgmma_{kind}(float (&d)[{count}], const u32 (&a)[4], u64 b) {{\n"
            f'  asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k{columns}.f32.{kind}.{kind}'
            f' {{{sums}}}, {{{weights}}}, %{count + 4}, 1, 1, 1{transposed};"\n'
            f'    : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));\n'
            "}\n"
        )
    return text


def _compile(name: str, source: str, headers: Mapping[str, str], options: list[str]) -> bytes:
    nvrtc = library()
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    file = f"{name}.cu".encode()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), file, len(headers), texts, names
    )
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise CompilerError(
                f"{name}.cu",
                log.rstrip(b"\0").decode(errors="replace")[:2000],
                needed="source that NVRTC takes",
                do="Report this with the versions of torch and CUDA; ZQFP_PATH=reference goes on.",
            )
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of, get, program: ctypes.c_void_p) -> bytes:  # type: ignore[no-untyped-def]
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


@cache
def version() -> tuple[int, int]:
    """Of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def library() -> ctypes.CDLL:
    """NVRTC: among the installed wheels that of PyTorch's CUDA, else the newest, else the system's.

    Raises:
        CompilerError: there is none.
    """
    for path in _installed():
        try:
            for part in path.parent.glob("libnvrtc-builtins.so*"):  # it looks for it by name only
                ctypes.CDLL(str(part))
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilerError(
        "NVRTC",
        "no libnvrtc among the installed packages or on the system",
        needed="the run-time compiler of CUDA 12 or 13",
        do="Install PyTorch's CUDA build, or nvidia-cuda-nvrtc.",
    )


def _installed() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    yield from by_fitness(found, torch.version.cuda)


def by_fitness(libraries: list[Path], cuda: str | None) -> list[Path]:
    """Libraries named `libnvrtc.so.<major>`, that of PyTorch's CUDA first, then the newest.

    The driver that runs PyTorch takes the machine code of its CUDA; of a newer one it may not.
    """
    ending = f".{(cuda or '').split('.')[0]}"
    return sorted(libraries, key=lambda path: (path.suffix == ending, path.suffix), reverse=True)
