"""`harness bench` on a machine that others use too: seconds that the thread had the processor, drawn as two figures.

    python -P benchmarks/kernel_latency.py --settings W4A16g128,W4A8 --tokens 1,4,16,64 --out runs/latency

One 4096 × 4096 layer on one thread. What stands in the run folder is what `harness bench` would have written, and
`harness report` draws it in the same way; only the clock is another.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from harness import tables
from harness.kernels.bench import bench, record
from harness.kernels.machines import Cpu
from harness.kernels.timing import CpuTimer
from harness.reports import kernel_plots, kernel_tables
from harness.settings import Setting

SIZE, FLUSH_BYTES = 4096, 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="W4A16g128,W4A8")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    machine = Cpu(CpuTimer(FLUSH_BYTES, time.thread_time))
    settings = [Setting.parse(text) for text in asked.settings.split(",")]
    tokens = [int(text) for text in asked.tokens.split(",")]
    found = record(list(bench(settings, [(SIZE, SIZE)], tokens, machine)), machine)
    found.write(asked.out)
    print(tables.markdown(kernel_tables.grids([found])))
    for name, words in kernel_plots.draw([found], asked.out):
        print(f"{asked.out / name}: {words}")


if __name__ == "__main__":
    main()
