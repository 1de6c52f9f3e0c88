"""A finished cell of a small model, without the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.cells import Cell
from harness.driver import quantize_model
from harness.export.checkpoint import Finished
from harness.models import LoadedModel
from harness.progress import silent
from harness.registry import method_class
from harness.settings import Setting

Finish = Callable[[str, str], Finished]
CALIBRATION = torch.randint(2, 512, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def finish(tiny_model: LoadedModel, tmp_path: Path) -> Finish:
    def finished(method: str, setting: str) -> Finished:
        info, create = method_class(method)
        quantized = quantize_model(
            tiny_model, create(), Setting.parse(setting), CALIBRATION,
            seed=0, checkpoints=tmp_path / f"{method}-{setting}", progress=silent,
        )  # fmt: skip
        cell = Cell(
            model="tiny", model_path=str(tiny_model.path), weights_sha256="", method=info.name,
            method_source=info.name, method_sha256=info.sha256, options={}, setting=setting, dtype="float32",
            device="cpu", seed=0, calibration="pydoc:6x32", calibration_sha256=None, tasks=(), data_root=None,
        )  # fmt: skip
        return Finished(cell, quantized, tiny_model)

    return finished
