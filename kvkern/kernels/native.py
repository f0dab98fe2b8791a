"""The door to csrc_ref: compile the C reference on first use, load it, call it on plain CPU tensors.

`python -m kvkern.kernels.native` compiles ahead of time. The library lands in a per-user cache under a key made of the
sources, the compiler, its flags and the CPU's features, so a changed source or another machine never meets a stale
binary.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvkern.environment import c_compiler, user_cache
from kvkern.errors import LayoutError, UnsupportedError

ABI = 3
SCRATCH_BOUND_BYTES = 64 << 20
"""Scratch of one call stays under this, or under what a single query position of all readers needs, if that is more."""

# Plain loops over lanes need width, not licence: nothing here lets the compiler re-associate, contract or approximate.
_BIT_SAFE_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_SOURCES = ("attention.c", "append.c", "linear.c", "elementwise.c", "scratch.c")

_pointer, _int64 = ctypes.c_void_p, ctypes.c_int64


class AttentionCall(ctypes.Structure):
    """Mirror of `kv_attention` in csrc_ref/kvkern.h, which documents every field."""

    _fields_ = [
        *((name, _int64) for name in ("num_readers", "max_query_len", "num_q_heads", "num_kv_heads", "head_dim")),
        ("q", _pointer),
        *((name, _int64) for name in ("stride_qb", "stride_qh", "stride_qt")),
        ("out", _pointer),
        *((name, _int64) for name in ("stride_ob", "stride_ot", "stride_oh")),
        *((name, _pointer) for name in ("lse", "pool", "block_table")),
        *((name, _int64) for name in ("max_blocks", "block_tiles", "stride_tile", "layer_offset")),
        *((name, _pointer) for name in ("prefix_len", "reader_prefix", "suffix_len", "query_len")),
        *((name, _pointer) for name in ("suffix_k", "suffix_v")),
        *((name, _int64) for name in ("stride_sb", "stride_sh", "stride_st")),
        ("sm_scale", ctypes.c_float),
        ("key_run", _int64),
        *((name, _int64) for name in ("scratch_bound_bytes", "num_threads")),
    ]


class AppendCall(ctypes.Structure):
    """Mirror of `kv_append_call` in csrc_ref/kvkern.h."""

    _fields_ = [
        *((name, _int64) for name in ("num_readers", "num_kv_heads", "head_dim", "max_count")),
        *((name, _pointer) for name in ("k", "v")),
        *((name, _int64) for name in ("stride_kb", "stride_kh", "stride_kt")),
        *((name, _int64) for name in ("stride_vb", "stride_vh", "stride_vt")),
        *((name, _pointer) for name in ("first_slot", "count", "suffix_k", "suffix_v")),
        *((name, _int64) for name in ("stride_sb", "stride_sh", "stride_st")),
    ]


@dataclass(frozen=True)
class Build:
    """How the C library is, or would be, built here."""

    compiler: str
    compiler_version: str
    flags: tuple[str, ...]
    sources: Path
    library: Path


def source_dir() -> Path:
    """Return the folder of the C sources: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc_ref", package.parent / "csrc_ref"):
        if (folder / "kvkern.h").is_file():
            return folder
    raise LayoutError(f"csrc_ref is missing beside {package}: the installation is incomplete, reinstall kvkern")


def plan_build(sources: Path | None = None) -> Build:
    """Choose compiler, flags and the cached library's path.

    Args:
        sources: folder of the C sources; csrc_ref when None.

    Raises:
        UnsupportedError: there is no C compiler.
    """
    compiler = c_compiler()
    if compiler is None:
        raise UnsupportedError(
            "no C compiler found (looked for $CC, cc, gcc, clang): kvkern's CPU backend is C and is compiled on first "
            "use. Install one (Debian: apt-get install gcc libc6-dev) or set CC to its path."
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    flags = [*_BIT_SAFE_FLAGS, "-march=native"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    # clang would ask for another OpenMP runtime than the one that torch brings: one thread then.
    if _openmp_runtime() is not None and "clang" not in version.lower():
        flags.append("-fopenmp")
    key = hashlib.sha256()
    folder = sources or source_dir()
    for path in sorted([*folder.glob("*.c"), *folder.glob("*.h")]):
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    key.update("\0".join([compiler, version, *flags, platform.machine(), _cpu_features()]).encode())
    return Build(compiler, version, tuple(flags), folder, user_cache("csrc") / f"libkvkern-{key.hexdigest()[:32]}.so")


def compile_library(build: Build) -> Path:
    """Compile csrc_ref into the cache and return the library's path; a cached one is kept.

    Raises:
        UnsupportedError: the compiler failed; its words are in the message.
    """
    if build.library.exists():
        return build.library
    build.library.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(build.sources / name) for name in _SOURCES]
    with tempfile.TemporaryDirectory(dir=build.library.parent) as folder:
        objects = [str(Path(folder) / f"{Path(name).stem}.o") for name in _SOURCES]
        shared = str(Path(folder) / "library.so")
        for source, target in zip(sources, objects, strict=True):
            _run([build.compiler, *build.flags, "-fPIC", "-c", source, "-o", target])
        # Linked without -fopenmp: the OpenMP symbols come from the runtime that torch has already loaded, so that both
        # share one set of threads instead of two that spin against each other.
        _run([build.compiler, "-shared", *objects, "-o", shared, "-lm"])
        os.replace(shared, build.library)
    return build.library


@functools.cache
def library() -> ctypes.CDLL:
    """Load the C library, compiling it on first use.

    Raises:
        UnsupportedError: no compiler, or it failed.
    """
    return load_library(compile_library(plan_build()))


def load_library(path: Path) -> ctypes.CDLL:
    """Load a compiled csrc_ref and declare its functions.

    Raises:
        LayoutError: it has another ABI than this file.
    """
    runtime = _openmp_runtime()
    if runtime is not None:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    lib = ctypes.CDLL(str(path))
    lib.kv_attend_scratch_bytes.restype = lib.kv_abi.restype = _int64
    lib.kv_attend_scratch_bytes.argtypes = [_pointer]
    lib.kv_contract_id.restype = ctypes.c_char_p
    lib.kv_attend.argtypes = lib.kv_append.argtypes = [_pointer]
    lib.kv_exp.argtypes = lib.kv_round16.argtypes = [_pointer, _pointer, _int64]
    lib.kv_linear.argtypes = [_pointer]
    lib.kv_rms_norm.argtypes = [_pointer, _int64, _pointer, ctypes.c_float, _pointer, *[_int64] * 3]
    lib.kv_silu.argtypes = [*[_pointer] * 4, _int64]
    for function in (lib.kv_append, lib.kv_rms_norm, lib.kv_silu):
        function.restype = None
    if lib.kv_abi() != ABI:
        raise LayoutError(f"csrc_ref has ABI {lib.kv_abi()}, native.py expects {ABI}: reinstall kvkern")
    return lib


def attention_keys(
    *,
    pool: Tensor,
    block_table: Tensor,
    block_tiles: int,
    stride_tile: int,
    layer_offset: int,
    prefix_len: Tensor,
    reader_prefix: Tensor,
    suffix_len: Tensor,
    query_len: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
) -> bytes:
    """Return what `attend` must know of the keys: addresses, so the tensors must stay alive and in place.

    Args:
        pool: bf16 anchor; block offsets count elements from its data pointer.
        block_table: `[P, max_blocks, 2]` int64, offsets of each block's K and V.
        block_tiles: tiles of a full block.
        stride_tile: elements between neighbouring tiles of a block.
        layer_offset: elements from a tile's start to this layer's first KV head.
        prefix_len: int32, see csrc_ref/kvkern.h.
        reader_prefix: the same.
        suffix_len: the same.
        query_len: the same.
        suffix_k: `[B, num_kv_heads, tiles, head_dim, 64]` bf16, the last two axes dense.
        suffix_v: `[B, num_kv_heads, tiles, 64, head_dim]` bf16, with the strides of suffix_k.
    """
    call = AttentionCall(
        num_kv_heads=suffix_k.shape[1],
        pool=pool.data_ptr(), block_table=block_table.data_ptr(), max_blocks=block_table.shape[1],
        block_tiles=block_tiles, stride_tile=stride_tile, layer_offset=layer_offset,
        prefix_len=prefix_len.data_ptr(), reader_prefix=reader_prefix.data_ptr(),
        suffix_len=suffix_len.data_ptr(), query_len=query_len.data_ptr(),
        suffix_k=suffix_k.data_ptr(), suffix_v=suffix_v.data_ptr(),
        stride_sb=suffix_k.stride(0), stride_sh=suffix_k.stride(1), stride_st=suffix_k.stride(2),
    )  # fmt: skip
    return bytes(call)


def attention_call(keys: bytes, q: Tensor, out: Tensor, lse: Tensor | None) -> AttentionCall:
    """Return a call of `keys` (`attention_keys`) without scale and run; arguments as in `attend`."""
    call = AttentionCall.from_buffer_copy(keys)
    call.num_readers, call.num_q_heads, call.max_query_len, call.head_dim = q.shape
    call.q = q.data_ptr()
    call.stride_qb, call.stride_qh, call.stride_qt, _ = q.stride()
    call.out = out.data_ptr()
    call.stride_ob, call.stride_ot, call.stride_oh, _ = out.stride()
    if lse is not None:
        call.lse = lse.data_ptr()
    call.num_threads = torch.get_num_threads()
    return call


def attend(
    keys: bytes, q: Tensor, out: Tensor, lse: Tensor | None, *, sm_scale: float, key_run: int, scratch_bound_bytes: int
) -> None:
    """Attend under contract part A; the caller has validated everything (`kvkern.prefix_attention` does).

    Args:
        keys: what `attention_keys` returned; nothing else is to be done for each call.
        q: `[B, num_q_heads, Tq, head_dim]` bf16, innermost axis dense.
        out: `[B, Tq, num_q_heads, head_dim]` bf16, written.
        lse: `[B, num_q_heads, Tq]` fp32 contiguous, natural log, written; or None.
        sm_scale: factor of the scores, rounded to fp32.
        key_run: 512, 1024, or 0 for stock's rule.
        scratch_bound_bytes: queries are split so that scratch stays under it. Bits do not depend on it.
    """
    call = attention_call(keys, q, out, lse)
    call.sm_scale, call.key_run, call.scratch_bound_bytes = sm_scale, key_run, scratch_bound_bytes
    if library().kv_attend(ctypes.byref(call)):
        raise MemoryError(f"no memory for the scratch of attention: {scratch_bound_bytes} bytes are its bound")


def append(k: Tensor, v: Tensor, suffix_k: Tensor, suffix_v: Tensor, first_slot: Tensor, count: Tensor) -> None:
    """Write the last `count[b]` of each reader's new tokens into its suffix tiles.

    Args:
        k: `[B, num_kv_heads, T, head_dim]` bf16, innermost axis dense.
        v: the same.
        suffix_k: tiles as in `attend`, written in place.
        suffix_v: the same.
        first_slot: `[B]` int32, place in the suffix tiles of the first written token.
        count: `[B]` int32, tokens written per reader, at most T.
    """
    call = AppendCall(
        num_readers=k.shape[0], num_kv_heads=k.shape[1], max_count=k.shape[2], head_dim=k.shape[3],
        k=k.data_ptr(), stride_kb=k.stride(0), stride_kh=k.stride(1), stride_kt=k.stride(2),
        v=v.data_ptr(), stride_vb=v.stride(0), stride_vh=v.stride(1), stride_vt=v.stride(2),
        first_slot=first_slot.data_ptr(), count=count.data_ptr(),
        suffix_k=suffix_k.data_ptr(), suffix_v=suffix_v.data_ptr(),
        stride_sb=suffix_k.stride(0), stride_sh=suffix_k.stride(1), stride_st=suffix_k.stride(2),
    )  # fmt: skip
    library().kv_append(ctypes.byref(call))


def require_cpu(tensor: Tensor) -> None:
    """Refuse a tensor that C cannot read.

    Raises:
        UnsupportedError: it is on another device.
    """
    if tensor.device.type != "cpu":
        raise UnsupportedError(
            f"a tensor on {tensor.device}: C runs on a CPU only, move it there or take another backend or path"
        )


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, copied only when its innermost axis is not dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def _openmp_runtime() -> str | None:
    """Path of the GNU-compatible OpenMP runtime that torch has mapped into this process, if any."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    found = re.findall(r"(/\S*lib(?:gomp|iomp5)[^/\s]*\.so[^/\s]*)", maps.read_text())
    return sorted(set(found))[0] if found else None


def _cpu_features() -> str:
    """Flags of the first CPU, as the kernel lists them; -march=native depends on these."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    line = re.search(r"^(?:flags|Features)\s*:.*$", info, re.MULTILINE)
    return line.group(0) if line else platform.processor()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnsupportedError(f"compiling kvkern's C backend failed: {' '.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    planned = plan_build()
    print(f"{planned.compiler} ({planned.compiler_version}) {' '.join(planned.flags)}")
    print(compile_library(planned))
    library()
    sys.exit(0)
