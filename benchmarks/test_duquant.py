"""How fast DuQuant's search is, as a ratio to the textbook search in the same run, and what its transforms cost."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibration import CalibrationSpec, calibration_ids
from harness.driver import quantize_model
from harness.methods.duquant import DuQuant
from harness.methods.duquant_search import exchange, greedy_rotation, random_rotation
from harness.models import LoadedModel, load_model
from harness.progress import silent
from harness.quantized import QuantizedModel
from harness.settings import Setting
from harness.window import Window, open_streams

STEPS = 256
SEARCHED_BLOCKS = (0, 9, 19, 29)


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> LoadedModel:
    return load_model(smollm2_folder, name="smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def calibration(model: LoadedModel) -> torch.Tensor:
    return torch.from_numpy(calibration_ids(CalibrationSpec.parse("pydoc:32x512"), model.tokenizer, None, 0))


def searched_rows(model: LoadedModel, calibration: torch.Tensor) -> dict[str, np.ndarray]:
    """What the search looks at, by shared input: the mean sequence, in blocks of channels."""
    rows = {}
    with torch.no_grad():
        streams = open_streams(model.module, model.architecture, calibration, frozenset({"mean"}))
        for i, block in enumerate(model.architecture.blocks):
            window = Window(i, (block,), streams.runner, 0, lambda _: None, streams.streams)
            for (stop,) in window.walk(window.mean):
                if stop.names and i in SEARCHED_BLOCKS:
                    (x,) = stop.tokens()
                    rows[stop.names[0]] = x.reshape(-1, 64).numpy()
            streams.streams["mean"] = replace(window.mean, chunks=stop.chunks)
    return rows


def textbook_search(rows: np.ndarray, factor: np.ndarray) -> tuple[list[int], float]:
    """All rows, every step: find the outlier, turn everything by one factor, and look again."""
    z, m = torch.from_numpy(rows), torch.from_numpy(factor).float()
    selected, best = [], float("inf")
    for _ in range(STEPS):
        best = min(best, float(z.max() - z.min()))
        at = int(z.argmax()) if z.max() > -z.min() else int(z.argmin())
        selected.append(at % z.shape[1])
        order = torch.from_numpy(exchange(z.shape[1], selected[-1]))
        z = (z[:, order] @ m)[:, order]
    return selected, min(best, float(z.max() - z.min()))


def test_search(benchmark, model: LoadedModel, calibration: torch.Tensor) -> None:
    """256 steps on the inputs of four blocks of the real model: at least ten times, with the same selections."""
    seconds = {"textbook": 0.0, "ours": 0.0}
    for i, rows in enumerate(searched_rows(model, calibration).values()):
        factor = random_rotation(64, torch.Generator().manual_seed(i))
        start = time.perf_counter()
        selected, best = textbook_search(rows, factor)
        middle = time.perf_counter()
        found = greedy_rotation(rows, lambda factor=factor: factor, STEPS, by="paper", score="range")
        seconds["textbook"] += middle - start
        seconds["ours"] += time.perf_counter() - middle
        assert list(found.selected) == selected
        assert found.scores[found.steps] == pytest.approx(best, rel=1e-3)
    benchmark.extra_info["ratio to the textbook search"] = seconds["textbook"] / seconds["ours"]
    benchmark.pedantic(greedy_rotation, (rows, lambda: factor, STEPS), {"by": "paper", "score": "range"}, rounds=3)
    assert seconds["textbook"] / seconds["ours"] >= 10


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_whole_model(benchmark, model: LoadedModel, calibration: torch.Tensor, tmp_path: Path, weights: str) -> None:
    """Quantizing all of the real model, statistics included; ``rtn`` is the paper's, ``gptq`` the default."""

    def quantize() -> QuantizedModel:
        return quantize_model(
            model, DuQuant(weights=weights), Setting.parse("W4A4"), calibration, seed=0, checkpoints=tmp_path,
            progress=silent,
        )  # fmt: skip

    result = benchmark.pedantic(quantize, rounds=1)
    benchmark.extra_info["seconds of the searches"] = sum(row["search_seconds"] for row in result.report)


def test_online_transforms(benchmark, model: LoadedModel, calibration: torch.Tensor, tmp_path: Path) -> None:
    """The share of a forward pass that the transforms take. Hadamard matrices cost what found rotations cost."""
    result = quantize_model(
        model, DuQuant(rotation="hadamard", weights="rtn"), Setting.parse("W4A4"), calibration[:1], seed=0,
        checkpoints=tmp_path, progress=silent,
    )  # fmt: skip
    linears = {name: replace(part, transform=None) for name, part in result.linears.items()}
    plain = QuantizedModel(linears, result.norms)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with torch.inference_mode():
        for _ in range(3):  # interleaved: what else the machine does hits both
            for kind, installed in (("with", result), ("without", plain)):
                fresh = load_model(model.path, name="smollm2-135m", dtype="float32", device="cpu")
                installed.install(fresh.module, fresh.architecture)
                fresh.module(input_ids=calibration[:1])
                start = time.perf_counter()
                fresh.module(input_ids=calibration[:4])
                seconds[kind].append(time.perf_counter() - start)
        benchmark.pedantic(fresh.module, kwargs={"input_ids": calibration[:4]}, rounds=1)
    share = 1 - min(seconds["without"]) / min(seconds["with"])
    benchmark.extra_info["share of the forward pass in transforms"] = share
    shared = {id(part.transform): part for part in result.linears.values()}.values()
    adds = sum(part.transform.multiply_adds(part.codes.shape[1]) for part in shared if part.transform)
    weights = sum(part.codes.numel() for part in result.linears.values())
    benchmark.extra_info["multiply-adds of transforms per weight"] = adds / weights
    assert 0 < share < 0.5
