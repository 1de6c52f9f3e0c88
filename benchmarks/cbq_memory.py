"""How much memory a window of CBQ takes beside the model: against the window's size, for both kinds of rounding.

    python -P benchmarks/cbq_memory.py smollm2-135m --figure docs/figures/cbq_memory.svg

Every point is a fresh process that trains one window on a few short sequences, so that weights, not activations, fill
the memory. The slope of the line through the points is what a window costs, in multiples of its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SIZES = (1, 2, 4, 8)
SEQUENCES, LENGTH = 4, 32
COLORS = {"full": "#0072B2", "lora": "#D55E00"}
MIB = 2**20


def peak_bytes() -> int:
    """Most memory resident since the mark was last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, kind: str, size: int) -> dict[str, int]:
    """Runs in a process of its own."""
    import torch

    from harness.driver import quantize_model
    from harness.models import load_model
    from harness.progress import silent
    from harness.registry import create_method
    from harness.settings import Setting

    model = load_model(folder, name=folder.name)
    model.module.model.layers = model.module.model.layers[:size]
    ids = torch.randint(5, 1000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    method = create_method("cbq", {"size": size, "stride": size, "rounding": kind, "epochs": 1})
    for parameter in model.module.parameters():
        parameter.sum()  # weights that are mapped from a file are resident once they have been read
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    before = resident_bytes()
    with tempfile.TemporaryDirectory() as checkpoints:
        quantize_model(
            model, method, Setting.parse("W2A16g64"), ids, seed=0, checkpoints=Path(checkpoints), progress=silent
        )
    weights = sum(model.module.get_submodule(name).weight.numel() * 4 for name in model.architecture.linears)
    return {"bytes": peak_bytes() - before, "weight_bytes": weights}


def in_fresh_process(folder: Path, kind: str, size: int) -> dict[str, int]:
    # Whatever is freed goes back at once, so that what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    words = [sys.executable, "-P", __file__, "--once", str(folder), kind, str(size)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(kind, size, found, file=sys.stderr, flush=True)
    return found


def draw(lines: dict[str, tuple[list[float], list[float], float]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "cbq", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for kind, (x, y, slope) in lines.items():
        axis.plot(x, y, "o-", color=COLORS[kind], label=f"rounding={kind}: {slope:.2f} × the weights")
    axis.set(xlabel="weights of the window, MiB of float32", ylabel="memory beside the model, MiB")
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    from harness.presets import resolve_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--figure", type=Path, required=True)
    asked = parser.parse_args()
    folder = resolve_model(asked.model).path
    assert folder is not None, f"run: harness models fetch {asked.model}"
    lines = {}
    print("| rounding | blocks in the window | MiB of weights | MiB beside the model |\n| --- | ---: | ---: | ---: |")
    for kind in COLORS:
        found = [in_fresh_process(folder, kind, size) for size in SIZES]
        x, y = ([part[key] / MIB for part in found] for key in ("weight_bytes", "bytes"))
        lines[kind] = x, y, float(np.polyfit(x, y, 1)[0])
        for size, weights, beside in zip(SIZES, x, y, strict=True):
            print(f"| {kind} | {size} | {weights:.1f} | {beside:.0f} |")
    for kind, (x, y, slope) in lines.items():
        print(f"{kind}: {slope:.2f} × the weights, R² = {np.corrcoef(x, y)[0, 1] ** 2:.4f}")
    draw(lines, asked.figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
    else:
        main()
