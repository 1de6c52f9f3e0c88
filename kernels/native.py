"""Our own kernel in C, compiled once by this machine's compiler; nothing is compiled when this is imported.

What was compiled lies in the cache folder under a name made of the source, the command and the compiler's version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from harness.atomic import replacing
from harness.errors import Unsupported
from harness.paths import cache_dir
from harness.provenance import cpu

_NEEDS = ("avx2", "fma", "f16c")
_WIDE = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512_vnni": "-mavx512vnni"}
_SOURCE = Path(__file__).with_name("w4a16.c")
_FLAGS = ("-O3", "-std=c11", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC")
_COMPILE_SECONDS = 120


@functools.cache
def unavailable() -> str | None:
    """Why there is no kernel on this machine, or None."""
    try:
        library()
    except Unsupported as error:
        return error.what
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, compiled if it is not in the cache. Raises Unsupported where it cannot be had."""
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
    key = hashlib.sha256("\0".join((_SOURCE.read_text(), *command, version)).encode()).hexdigest()
    target = cache_dir() / "native" / f"w4a16-{key[:32]}.so"
    if not target.is_file():
        with replacing(target) as temporary:
            words = [*command, str(_SOURCE), "-o", str(temporary)]
            subprocess.run(words, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=True)
    found = ctypes.CDLL(str(target))
    pointer, count = ctypes.c_void_p, ctypes.c_long
    found.w4a16.argtypes = [pointer, count, pointer, count, pointer, count, count, ctypes.c_int, count, count]
    found.w4a16.restype = ctypes.c_int
    return found
