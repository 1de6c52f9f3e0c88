"""What a method costs: seconds against calibration tokens and decoder blocks, and the memory of quantization alone.

    python -P benchmarks/cost.py smollm2-135m --data-root DATA --figure docs/figures/cost_gptq.svg
    python -P benchmarks/cost.py smollm2-135m --method cbq:epochs=1 --setting W2A16g64 --tokens 2048 4096 8192 \
        --tokens-of-blocks 2048 --data-root DATA --figure docs/figures/cost_cbq.svg

Every point is a fresh process that quantizes the model's first blocks as a worker does, reading them one by one, and
evaluates nothing. Seconds are those of the processor, summed over threads, so that what else the machine does is left
out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

LENGTH = 512
BLOCKS = (5, 10, 20, 30)
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito: told apart with any colour vision
MIB = 2**20


@dataclass(frozen=True)
class Asked:
    """What is quantized, and by what."""

    folder: str
    method: str
    setting: str
    threads: int
    calibration: str
    """A file of token ids."""
    dtype: str = "float32"
    """Of the forward passes."""


@dataclass(frozen=True)
class Cost:
    """Of one quantization in a fresh process."""

    tokens: int
    blocks: int
    processor_seconds: float
    wall_seconds: float
    model_bytes: int
    loaded_bytes: int
    """Most memory resident up to the moment when the model was there: imports, and all weights but those of blocks."""
    peak_bytes: int


@dataclass(frozen=True)
class Line:
    """A straight line through points, by least squares."""

    slope: float
    offset: float
    r_squared: float

    @classmethod
    def through(cls, x: list[int], y: list[float]) -> Line:
        slope, offset = np.polyfit(x, y, 1)
        residual = np.asarray(y) - (slope * np.asarray(x) + offset)
        return cls(float(slope), float(offset), float(1 - residual.var() / np.var(y)))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def quantize_once(asked: Asked, tokens: int, blocks: int) -> Cost:
    """Runs in a process of its own."""
    import torch
    from safetensors.torch import load_file

    from harness.driver import quantize_to_files
    from harness.models import load_model
    from harness.placement import Placement
    from harness.progress import silent
    from harness.registry import create_method, describe_methods, find_method
    from harness.settings import Setting
    from harness.specs import Spec, bind

    torch.set_num_threads(asked.threads)
    spec, setting = Spec.parse(asked.method), Setting.parse(asked.setting)
    method = create_method(spec.name, bind(find_method(spec.name, describe_methods()).options, spec))
    folder = Path(asked.folder)
    model = load_model(folder, name=folder.name, dtype=asked.dtype, placement=Placement(paged=True))
    model.module.model.layers = model.module.model.layers[:blocks]
    loaded = peak_bytes()
    ids = load_file(asked.calibration)["ids"].reshape(-1, LENGTH)[: tokens // LENGTH]
    with tempfile.TemporaryDirectory() as checkpoints:
        wall, processor = time.perf_counter(), time.process_time()
        quantize_to_files(model, method, setting, ids, seed=0, checkpoints=Path(checkpoints), progress=silent)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    size = sum(p.numel() * p.element_size() for p in model.module.parameters())
    return Cost(tokens, blocks, processor, wall, size, loaded, peak_bytes())


def in_fresh_process(asked: Asked, tokens: int, blocks: int) -> Cost:
    words = [sys.executable, "-P", __file__, "--once", json.dumps(asdict(asked)), str(tokens), str(blocks)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    cost = Cost(**json.loads(done.stdout.splitlines()[-1]))
    print(cost, file=sys.stderr)
    return cost


def write_calibration(folder: Path, data_root: Path | None, tokens: int, out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from harness.calibration import CalibrationSpec, calibration_ids

    spec = CalibrationSpec.parse(f"c4:{tokens // LENGTH}x{LENGTH}")
    save_file(
        {"ids": torch.from_numpy(calibration_ids(spec, AutoTokenizer.from_pretrained(folder), data_root, 0))}, out
    )


def draw(panels: dict[str, tuple[list[int], list[float], Line]], out: Path) -> None:
    """One panel for each quantity that was varied: the points, and the line through them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "cost", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(7, 2.7), layout="constrained")
    for axis, (label, (x, y, line)) in zip(axes, panels.items(), strict=True):
        ends = np.asarray([0, max(x)])
        axis.plot(ends, line.slope * ends + line.offset, "--", color=ORANGE, label=f"line, R² = {line.r_squared:.4f}")
        axis.plot(x, y, "o", color=BLUE, label="measured")
        axis.set(xlabel=label, ylabel="processor seconds", xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def table(costs: list[Cost]) -> str:
    rows = [
        "| tokens | blocks | processor seconds | peak memory | beside the model |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in costs:
        peak, beside = f"{c.peak_bytes / MIB:.0f} MiB", f"{(c.peak_bytes - c.model_bytes) / MIB:.0f} MiB"
        rows.append(f"| {c.tokens:,} | {c.blocks} | {c.processor_seconds:.1f} | {peak} | {beside} |")
    return "\n".join(rows)


def main() -> None:
    from harness.presets import resolve_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--setting", default="W4A16g64")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--tokens-of-blocks", type=int, default=8192, help="where the number of blocks varies")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="of the forward passes")
    parser.add_argument("--figure", type=Path, required=True)
    given = parser.parse_args()
    folder = resolve_model(given.model).path
    assert folder is not None, f"run: harness models fetch {given.model}"
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.safetensors"
        write_calibration(folder, given.data_root, max(*given.tokens, given.tokens_of_blocks), ids)
        asked = Asked(str(folder), given.method, given.setting, given.threads, str(ids), given.dtype)
        of_tokens = [in_fresh_process(asked, tokens, max(BLOCKS)) for tokens in given.tokens]
        of_blocks = [in_fresh_process(asked, given.tokens_of_blocks, blocks) for blocks in BLOCKS]
    panels = {}
    for label, x, costs in (
        (f"calibration tokens ({max(BLOCKS)} blocks)", list(given.tokens), of_tokens),
        (f"decoder blocks ({given.tokens_of_blocks:,} tokens)", list(BLOCKS), of_blocks),
    ):
        seconds = [cost.processor_seconds for cost in costs]
        panels[label] = (x, seconds, Line.through(x, seconds))
    draw(panels, given.figure)
    print(table([*of_tokens, *of_blocks]))
    for label, (_, _, line) in panels.items():
        print(f"{label}: {line.slope:.4g} s each and {line.offset:.1f} s, R² = {line.r_squared:.5f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        found = quantize_once(Asked(**json.loads(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4]))
        print(json.dumps(asdict(found)))
    else:
        main()
