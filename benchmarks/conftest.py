"""The real model, from the user's cache or fetched into it."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    words = [sys.executable, "-P", "-m", "harness", "models", "fetch", "smollm2-135m"]
    return Path(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
