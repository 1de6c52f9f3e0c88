"""Sizes of memory as typed."""

from __future__ import annotations

import pytest

from harness.errors import HarnessError
from harness.limits import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5GiB", 3 * 2**29), (" 800 mb ", 8 * 10**8), ("512B", 512)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "0GB", "1e3GB", "1XB"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(HarnessError, match="is not a size"):
        parse_bytes(text)


def test_sizes_are_shown() -> None:
    assert [show_bytes(size) for size in (5, 1500, 2 * 10**9, 3 * 10**12)] == ["5 B", "1.5 kB", "2.0 GB", "3.0 TB"]
