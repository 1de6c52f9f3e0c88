"""The command line, whose cells :mod:`stand_in` computes: children are started by the script ``python`` beside this."""

import os
import sys
from pathlib import Path

os.environ["HARNESS_TEST_PYTHON"] = sys.executable
sys.executable = str(Path(__file__).with_name("python"))

from harness.cli import main  # noqa: E402

main()
