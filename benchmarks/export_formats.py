"""Exported cells beside the cells themselves: the largest difference of logits, and how many top-1 tokens differ.

    python -P benchmarks/export_formats.py runs/known/cells/* --formats native,gptq,compressed-tensors

On 1,000 tokens of pydoc in float32 on the CPU. Every format but the harness' own is loaded back through transformers by
the format's library (``tests/export/load_back.py``), in the interpreter ``--python``, which need not have the harness.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import harness
from harness.calibration import CalibrationSpec, calibration_ids
from harness.export import FORMATS, export
from harness.export.checkpoint import read_finished

LOAD_BACK = Path(__file__).parents[1] / "tests" / "export" / "load_back.py"
TEXT = "pydoc:2x500"


def cell_logits(cell: Path) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What the cell is, the token ids, and the logits of its model."""
    finished = read_finished(cell)
    ids = torch.from_numpy(calibration_ids(CalibrationSpec.parse(TEXT), finished.model.tokenizer, None, seed=0))
    finished.quantized.install(finished.model.module, finished.model.architecture)
    return f"{finished.cell.label} {finished.cell.setting}", ids, logits(finished.model.module, ids)


def logits(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([module(input_ids=row[None]).logits.float() for row in ids])


def loaded_logits(folder: Path, format: str, ids: torch.Tensor, python: str) -> torch.Tensor:
    if format == "native":
        return logits(harness.load(folder).module, ids)
    save_file({"ids": ids}, folder / "ids")
    subprocess.run([python, str(LOAD_BACK), str(folder), str(folder / "ids"), str(folder / "logits")], check=True)
    return load_file(folder / "logits")["logits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", type=Path, help="folders of finished cells")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has the formats' libraries")
    asked = parser.parse_args()
    print("| cell | format | largest difference of logits | largest logit | top-1 tokens that differ |")
    print("| --- | --- | --- | --- | --- |")
    for cell in asked.cells:
        name, ids, expected = cell_logits(cell)
        for format in asked.formats.split(","):
            with tempfile.TemporaryDirectory() as folder:
                got = loaded_logits(export(cell, format, Path(folder) / "out"), format, ids, asked.python)
            flips = int((got.argmax(dim=-1) != expected.argmax(dim=-1)).sum())
            off, largest = float((got - expected).abs().max()), float(expected.abs().max())
            print(f"| {name} | {format} | {off:.2g} | {largest:.1f} | {flips} of {ids.numel()} |", flush=True)


if __name__ == "__main__":
    main()
