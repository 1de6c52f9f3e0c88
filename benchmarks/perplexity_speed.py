"""What perplexity evaluation costs beyond the forward passes it needs.

    OMP_NUM_THREADS=2 python -P benchmarks/perplexity_speed.py smollm2-135m --windows 8 --length 2048

Bare passes (the model's logits, and nothing done with them) and the evaluation take turns on the same windows of pydoc;
the ratio is that of the sums, with the smallest and the largest of the single windows.
"""

from __future__ import annotations

import argparse
import time

import torch

from harness.fetch import fetch
from harness.models import load_model
from harness.presets import resolve_model
from harness.tasks.perplexity import evaluation_windows, score_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    asked = parser.parse_args()
    model = load_model(fetch(resolve_model(asked.model), lambda *_: None), name=asked.model, dtype="float32")
    ids = evaluation_windows("pydoc", asked.length, asked.windows, model, None).ids
    score_windows(model, ids[:1], None, lambda *_: None)  # warm-up
    bare, scored = [], []
    for number in range(len(ids)):
        window = ids[number : number + 1]
        with torch.inference_mode():
            started = time.perf_counter()
            model.module(window, use_cache=False)
            bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        score_windows(model, window, None, lambda *_: None)
        scored.append(time.perf_counter() - started)
    ratios = sorted(one / other for one, other in zip(scored, bare, strict=True))
    print(
        f"{sum(scored) / sum(bare):.3f} of the bare passes ({ratios[0]:.3f} to {ratios[-1]:.3f}); "
        f"{ids.numel() / sum(bare):.0f} tokens/s bare, {ids.numel() / sum(scored):.0f} scored, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
