"""The real model, how two ways of doing the same are compared, and that nothing else is in what is timed."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--jaxtyping-packages"):
        raise pytest.UsageError("the tests' checks of tensor shapes would be timed too: tox -e bench")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """From the user's cache, or fetched into it."""
    words = [sys.executable, "-P", "-m", "harness", "models", "fetch", "smollm2-135m"]
    return Path(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture(scope="session")
def ratio() -> Callable[..., float]:
    return median_ratio


def median_ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """Median of the ratios of interleaved rounds, in processor seconds: what else the machine does is left out."""
    slow(), fast()
    ratios = []
    for _ in range(rounds):
        start = time.process_time()
        slow()
        middle = time.process_time()
        fast()
        ratios.append((middle - start) / (time.process_time() - middle))
    return statistics.median(ratios)
