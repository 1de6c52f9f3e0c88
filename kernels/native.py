"""Our own kernels in C, compiled once by this machine's compiler; nothing is compiled when this is imported.

What was compiled lies in the cache folder under a name made of the sources, the command and the compiler's version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.atomic import replacing
from harness.errors import Unsupported
from harness.paths import cache_dir
from harness.provenance import cpu

_NEEDS = ("avx2", "fma", "f16c")
_WIDE = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512_vnni": "-mavx512vnni"}
_SOURCES = [Path(__file__).with_name(name) for name in ("lanes.h", "w4a16.c", "tokens.c")]
_FLAGS = ("-O3", "-std=c11", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC")
_COMPILE_SECONDS = 120


@functools.cache
def unavailable() -> str | None:
    """Why there are no kernels on this machine, or None."""
    try:
        library()
    except Unsupported as error:
        return error.what
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if they are not in the cache. Raises Unsupported where they cannot be had."""
    if missing := [name for name in _NEEDS if name not in cpu()["flags"]]:
        raise Unsupported(f"this processor has no {', '.join(missing)}", fix="torch's operators are used")
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        raise Unsupported(f"there is no C compiler {compiler[0]!r}", fix="install one, or name it in CC")
    try:
        return _loaded([*compiler, *_FLAGS, *wide_flags()])
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
        raise Unsupported(f"the C compiler or what it made fails: {lines[-1]}", fix="name another in CC") from error


def wide_flags() -> tuple[str, ...]:
    """What has the compiler use registers of 512 bits, where this processor can do with them what the kernel asks."""
    return tuple(_WIDE.values()) if set(cpu()["flags"]) >= _WIDE.keys() else ()


def _loaded(command: list[str]) -> ctypes.CDLL:
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=True
    ).stdout
    sources = [source.read_text() for source in _SOURCES]
    key = hashlib.sha256("\0".join((*sources, *command, version)).encode()).hexdigest()
    target = cache_dir() / "native" / f"kernels-{key[:32]}.so"
    if not target.is_file():
        with replacing(target) as temporary:
            files = [str(source) for source in _SOURCES if source.suffix == ".c"]
            words = [*command, *files, "-o", str(temporary), "-lm"]
            subprocess.run(words, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=True)
    found = ctypes.CDLL(str(target))
    pointer, count, flag, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    found.w4a16.argtypes = [pointer, count, pointer, count, pointer, count, count, flag, count, count]
    found.w4a16.restype = flag
    found.encode_tokens.argtypes = [pointer, count, flag, flag, number, flag, count, count, pointer, pointer, pointer]
    found.encode_tokens.restype = None
    found.finish_tokens.argtypes = [pointer, count, pointer, pointer, pointer, pointer, count, count]
    found.finish_tokens.restype = None
    return found


def in_parts(work: Callable[[int, int], int | None], parts: int) -> list[int | None]:
    """``work(part, parts)`` for every part, side by side; Python lets go of its lock while C runs."""
    if parts == 1:
        return [work(0, 1)]
    return list(_threads(parts).map(work, range(parts), [parts] * parts))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)
