"""Whatever is read: the harness's own error or an answer, soon."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from pathlib import Path

import pytest
from faults.damage import damaged
from faults.fuzz import TARGETS, examine
from faults.seeds import seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import processes

SLOWEST_SECONDS = 5.0  # of processor time


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    found = defaultdict(list)
    for name, data in seeds(tmp_path_factory.mktemp("seeds")):
        found[name].append(data)
    return found


@pytest.mark.fault(10)
@pytest.mark.parametrize("target", TARGETS)
def test_10_only_our_own_error(target: str, sound: dict[str, list[bytes]], tmp_path: Path, long: bool, figure) -> None:
    """From nothing, and from sound inputs with up to four mutations."""
    counts = {"inputs": 0, "taken": 0}
    slowest, before = 0.0, processes.peak_resident_bytes()

    def tried(data: bytes) -> None:
        nonlocal slowest
        start = time.process_time()
        counts["taken"] += examine(target, data, tmp_path)
        counts["inputs"] += 1
        slowest = max(slowest, time.process_time() - start)

    @settings(
        max_examples=3000 if long else 40, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(str.encode), st.sampled_from(sound[target])))
    def from_nothing(data: bytes) -> None:
        tried(data)

    @settings(max_examples=5000 if long else 60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sound[target]), st.integers(0, 2**32), st.integers(1, 4))
    def from_sound(data: bytes, seed: int, times: int) -> None:
        dice = random.Random(seed)
        for _ in range(times):
            data = damaged(data, dice) if data else data
        tried(data)

    for data in sound[target]:
        tried(data)
    assert counts["taken"] > 0  # sound inputs are taken
    from_nothing()
    from_sound()
    assert slowest < SLOWEST_SECONDS
    grown = (processes.peak_resident_bytes() - before) / 1e6
    assert grown < 1500
    figure(10, f"{target}: {counts['inputs']:,} inputs, 0 uncaught, {slowest:.2f} s at most, +{grown:.0f} MB")


SUMMARY = b'{"task": "pydoc", "seconds": 1, "measurements": %s}'
NASTY = [
    b"\0", b"a\0b", b"x" * 5000, b"../../x", b"~nobody/x", b"a;rm -rf /", "W４A16".encode(), b"W4A16g" + b"9" * 5000,
    b"rtn:" + b":" * 100, b"rtn:clip_search=" + b"1" * 5000, b"=cmd()", b"<script>", b"a|b", b"1e400GB",
    b"9" * 400 + b"GB", b"[" * 100_000, b'{"a":' * 20_000, b'{"format": 1e999}', b'{"weight_map": {"a": ["x"]}}',
    b"\xff\xfe", b"NaN", b"-Infinity", b"x = " + b"[" * 5000, b"jobs = 99999999999999999999",
    b'models = ["\\u0000"]', b'methods = ["\\u0000.py"]', b"c4:999999999x999999999", b"rtn.py", b"/dev/zero",
    b"/dev/null.py", b'{"status": "ok", "attempt": true, "reason": null}', SUMMARY % b"3", SUMMARY % b"[{}]",
    SUMMARY % b'[{"metric": "acc", "value": 1e999, "stderr": null, "n": 1e999, "higher_is_better": 1}]',
]  # fmt: skip


@pytest.mark.fault(10, 28)
@pytest.mark.parametrize("target", TARGETS)
def test_10_known_nasty_inputs(target: str, tmp_path: Path) -> None:
    for data in NASTY:
        examine(target, data, tmp_path)
    header = b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'
    for raw in (b"[" * 100_000, header, b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}'):
        examine(target, len(raw).to_bytes(8, "little") + raw + bytes(4), tmp_path)
