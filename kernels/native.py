"""Our own kernels in C, compiled once by this machine's compiler; nothing is compiled when this is imported.

What was compiled lies in the cache folder under a name made of the sources, the command and the compiler's version;
before it is kept, ``trial.py`` has tried it in a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.atomic import replacing
from harness.errors import Unsupported
from harness.paths import cache_dir
from harness.provenance import cpu

_NEEDS = ("avx2", "fma", "f16c")
# What more a processor may have, each beside what stands before it, and the compiler's words for it.
_MORE = (
    (("avx512f", "avx512bw", "avx512_vnni"), ("-mavx512f", "-mavx512bw", "-mavx512vnni")),
    (("amx_int8",), ("-mamx-tile", "-mamx-int8")),
)
_SOURCES = [Path(__file__).with_name(name) for name in ("lanes.h", "tiles.h", "w4a16.c", "tokens.c", "wna8.c")]
_TRIAL = Path(__file__).with_name("trial.py")
_FLAGS = (
    "-O3", "-std=c11", "-D_DEFAULT_SOURCE", "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC",
)  # fmt: skip
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
    wrong: Exception | None = None
    for options in levels():
        try:
            return _loaded([*compiler, *_FLAGS, *options])
        except subprocess.CalledProcessError as error:
            wrong = error  # less may do
        except (OSError, subprocess.SubprocessError) as error:
            wrong = error
            break
    lines = (getattr(wrong, "stderr", None) or str(wrong)).strip().splitlines() or [type(wrong).__name__]
    raise Unsupported(f"the C compiler or what it made fails: {lines[-1]}", fix="name another in CC") from wrong


def instructions() -> str:
    """What the kernels were compiled for."""
    return bytes(library().wna8_instructions()).decode()


def levels() -> list[tuple[str, ...]]:
    """What may be said to the compiler: of all that the kernels could do with on this processor first, of least last.

    An older compiler, or a system that keeps instructions to itself, may refuse some.
    """
    found: list[tuple[str, ...]] = [()]
    for needed, words in _MORE:
        if not set(cpu()["flags"]).issuperset(needed):
            break
        found.insert(0, (*found[0], *words))
    return found


def _loaded(command: list[str]) -> ctypes.CDLL:
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=True
    ).stdout
    sources = [source.read_text() for source in (*_SOURCES, _TRIAL)]
    key = hashlib.sha256("\0".join((*sources, *command, version)).encode()).hexdigest()
    target = cache_dir() / "native" / f"kernels-{key[:32]}.so"
    if not target.is_file():
        with replacing(target) as temporary:
            files = [str(source) for source in _SOURCES if source.suffix == ".c"]
            words = [*command, *files, "-o", str(temporary), "-lm"]
            for run in (words, [sys.executable, "-I", str(_TRIAL), str(temporary)]):
                subprocess.run(run, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=True)
    found = ctypes.CDLL(str(target))
    pointer, count, flag, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    found.w4a16.argtypes = [pointer, count, pointer, count, pointer, count, count, flag, count, count]
    found.w4a16.restype = flag
    found.encode_tokens.argtypes = [
        pointer, count, flag, flag, number, flag, count, count, count, count, pointer, pointer, pointer, pointer,
    ]  # fmt: skip
    found.encode_tokens.restype = None
    found.wna8.argtypes = [
        pointer, count, pointer, count, pointer, pointer, pointer, count, pointer, count, count, count, count,
    ]  # fmt: skip
    found.wna8.restype = found.wna8_bits.restype = flag
    found.wna8_bits.argtypes = found.wna8_instructions.argtypes = []
    found.wna8_instructions.restype = ctypes.c_char_p
    return found


def in_parts(work: Callable[[int, int], int | None], parts: int) -> list[int | None]:
    """``work(part, parts)`` for every part, side by side; Python lets go of its lock while C runs."""
    if parts == 1:
        return [work(0, 1)]
    return list(_threads(parts).map(work, range(parts), [parts] * parts))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)
