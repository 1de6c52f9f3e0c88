"""CBQ on a small model, as several files of tests run it."""

from pathlib import Path
from typing import Any

import torch

from harness.driver import quantize_model
from harness.models import LoadedModel
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.settings import Setting

CALIBRATION = torch.randint(2, 512, (10, 32), generator=torch.Generator().manual_seed(0))
W2A16 = Setting.parse("W2A16g16")


def run(model: LoadedModel, method: Any, folder: Path, setting: str = "W2A16g16", progress: Any = silent) -> Any:
    parsed = Setting.parse(setting)
    return quantize_model(model, method, parsed, CALIBRATION, seed=0, checkpoints=folder, progress=progress)


def same(one: QuantizedModel, other: QuantizedModel) -> bool:
    return one.linears.keys() == other.linears.keys() and all(
        torch.equal(getattr(one.linears[n], part), getattr(other.linears[n], part))
        for n in one.linears
        for part in ("codes", "scales", "zeros")
    )
