"""For tests of our kernels in C."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.kernels import native


@pytest.fixture
def runs() -> None:
    if reason := native.unavailable():
        pytest.skip(reason)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about this machine, before the test and in it."""
    found = (native.library, native.unavailable)
    for one in found:
        one.cache_clear()
    yield
    for one in found:
        one.cache_clear()
