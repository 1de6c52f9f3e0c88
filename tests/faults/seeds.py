"""Sound inputs of every target of :mod:`fuzz`: what mutations start from."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from made_runs import CELL, make_run

SUMMARY = {
    "task": "pydoc", "seconds": 1.5, "manifest": {"vocabulary": 512},
    "measurements": [
        {"metric": "acc", "value": 0.5, "stderr": None, "n": 4, "higher_is_better": True, "samples": {"doc_id": "x"}}
    ],
}  # fmt: skip
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def seeds(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name of the target, input)."""
    for text in ("W4A16g64", "W4A4KV4", "W2A16g128sym"):
        yield "setting", text.encode()
    for text in ("gptq:damp=0.05:act_order=false", "rtn:clip_search=true", "cbq:epochs=1", "./mine.py:x=1"):
        yield "options", text.encode()
    for text in (
        "wikitext2:windows=16",
        "piqa:limit=100",
        "c4@train:32x512",
        "24GB",
        "org/name@main",
        "./folder",
        "ppl",
    ):
        yield "words", text.encode()
    yield "toml", b'methods = ["rtn"]\nmodels = ["smollm2-135m"]\nseed = 1\ntimeout = 2.5\n[quick]\ntasks = ["pydoc"]\n'
    run = make_run(folder / "seed", [(CELL, {"pydoc": (20.5, 0.5)}, "ok")])
    yield "plan_file", (run / "plan.json").read_bytes()
    yield "stored", (run / "run.sqlite").read_bytes()
    yield "cell_results", json.dumps(SUMMARY).encode()
    yield "cell_results", json.dumps({"attempt": 1, "status": "ok", "reason": None, "load_seconds": 1.0}).encode()
    header = json.dumps({"model.layers.0.a.weight": ENTRY, "__metadata__": {"format": "pt"}}).encode()
    yield "checkpoint", struct.pack("<Q", len(header)) + header + bytes(16)
    yield "configuration", json.dumps({"weight_map": {"x": "a.safetensors"}}).encode()
    yield from _packed(folder)


def _packed(folder: Path) -> Iterator[tuple[str, bytes]]:
    import torch

    from harness.kernels.pack import pack
    from harness.kernels.packfile import save_packed
    from harness.linear import round_to_nearest
    from harness.quantized import QuantizedModel
    from harness.settings import Setting

    linear = round_to_nearest(torch.randn(4, 64), Setting.parse("W4A8g64"))
    QuantizedModel({"a": linear}).save(folder / "seed.safetensors")
    yield "packed", (folder / "seed.safetensors").read_bytes()
    save_packed({"a": pack(linear)}, folder / "seed.safetensors")
    yield "packed", (folder / "seed.safetensors").read_bytes()
