"""Perplexity against the time that quantization takes: CBQ with more and more training, beside GPTQ, at full size.

    python -P benchmarks/cbq_budget.py --data-root ../shared/data --out runs/cbq-budget \
        --figure docs/figures/cbq_budget.svg --beside "AutoRound 0.16.1, 50 iterations:SECONDS:112.6"

The runs are the harness's own: stopped and started again, they go on. Times are wall times of one cell after another on
all cores; run nothing beside them. ``--beside`` adds points of other programs on the same machine, which are
drawn apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
CURVES = {
    "windows of 1": ["cbq:epochs=1", "cbq:epochs=2", "cbq:epochs=4", "cbq"],
    "windows of 2, stride 2": [f"cbq:size=2:stride=2:epochs={n}" for n in (1, 2, 4)],
    "windows of 2, stride 1": [f"cbq:size=2:epochs={n}" for n in (1, 2)],
    "scales alone": ["cbq:rounding=none:epochs=1"],
    "GPTQ": ["gptq"],
}


@dataclass(frozen=True)
class Point:
    label: str
    seconds: float
    perplexity: float


def harness(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "harness", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1):  # 1: some cell failed, which its status tells
        raise SystemExit(done.returncode)
    return done.stdout


def point(text: str) -> Point:
    """``label:seconds:perplexity``."""
    label, seconds, perplexity = text.rsplit(":", 2)
    return Point(label, float(seconds), float(perplexity))


def measured(run: Path) -> dict[str, Point]:
    """By method with its options: what the run's cells took and came to."""
    seconds = {
        c["cell"]: c["quantize_seconds"]
        for c in json.loads(harness("results", str(run), "--cells", "--format", "json"))
    }
    points = {}
    for row in json.loads(harness("results", str(run), "--format", "json")):
        if row["status"] == "ok" and row["metric"] == "token_perplexity" and row["method"] != "fp":
            options = "".join(f":{key}={value}" for key, value in sorted(row["options"].items()))
            points[row["method"] + options] = Point(row["method"] + options, seconds[row["cell"]], row["value"])
    return points


def canonical(method: str) -> str:
    name, *options = method.split(":")
    return ":".join([name, *sorted(options)])


def draw(points: dict[str, Point], beside: list[Point], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "cbq", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for label, methods in CURVES.items():
        found = [points[canonical(method)] for method in methods if canonical(method) in points]
        axis.plot([p.seconds for p in found], [p.perplexity for p in found], "o-", label=label)
    for p in beside:
        axis.plot(p.seconds, p.perplexity, "x", color=GREY)
        axis.annotate(p.label, (p.seconds, p.perplexity), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set(xlabel="seconds to quantize", ylabel="perplexity", xscale="log", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--setting", default="W2A16g64")
    parser.add_argument("--calibration", default="c4:32x512")
    parser.add_argument("--task", default="wikitext2:windows=16")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--beside", type=point, action="append", default=[])
    asked = parser.parse_args()
    methods = ",".join(method for curve in CURVES.values() for method in curve)
    harness(
        "run", "--methods", methods, "--models", asked.model, "--settings", asked.setting, "--tasks", asked.task,
        "--calibration", asked.calibration, "--data-root", str(asked.data_root), "--seed", str(asked.seed),
        "--jobs", "1", "--out", str(asked.out),
    )  # fmt: skip
    points = measured(asked.out)
    draw(points, asked.beside, asked.figure)
    print("| method | seconds | perplexity |\n| --- | ---: | ---: |")
    for p in sorted([*points.values(), *asked.beside], key=lambda p: p.seconds):
        print(f"| {p.label} | {p.seconds:.0f} | {p.perplexity:.1f} |")


if __name__ == "__main__":
    main()
