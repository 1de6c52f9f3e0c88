"""Cells as they come out, cells with one planted fault, and run folders made of their measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from harness.cells import Cell
from harness.linear import QuantizedLinear, round_to_nearest
from harness.models import LoadedModel
from harness.plan import ModelFacts
from harness.planfile import Plan, write_plan
from harness.quantized import QuantizedModel
from harness.quantizer import WeightFormat
from harness.runfolder import RunFolder
from harness.settings import Setting
from harness.store import Attempt, Measured, Run, Store
from harness.tasks.measurement import TaskResult, write_result

WHEN = "2026-01-01T00:00:00+00:00"

Fault = Callable[[QuantizedLinear, torch.Tensor, Setting], QuantizedLinear]


def rounded(model: LoadedModel, setting: Setting) -> QuantizedModel:
    """Every linear rounded to nearest."""
    modules = dict(model.module.named_modules())
    return QuantizedModel(
        {name: round_to_nearest(modules[name].weight, setting) for name in model.architecture.linears}
    )


def flipped_sign(linear: QuantizedLinear, weight: torch.Tensor, setting: Setting) -> QuantizedLinear:
    return round_to_nearest(-weight, setting)


def wrong_zero_point(linear: QuantizedLinear, weight: torch.Tensor, setting: Setting) -> QuantizedLinear:
    return replace(linear, zeros=(linear.zeros + 1).clamp(max=2**linear.bits - 1))


def one_bit_fewer(linear: QuantizedLinear, weight: torch.Tensor, setting: Setting) -> QuantizedLinear:
    coarse = round_to_nearest(weight, setting, format=replace(WeightFormat.of(setting), bits=linear.bits - 1))
    return replace(coarse, bits=linear.bits)  # it claims the bits that it does not use


def skipped_layer(linear: QuantizedLinear, weight: torch.Tensor, setting: Setting) -> QuantizedLinear:
    return replace(linear, codes=linear.zeros.repeat_interleave(linear.group_size, dim=1).contiguous())


FAULTS: Mapping[str, Fault] = {
    "a sign flip in one layer": flipped_sign,
    "a wrong zero point": wrong_zero_point,
    "one bit fewer in one layer": one_bit_fewer,
    "a skipped layer": skipped_layer,
}


def with_fault(model: LoadedModel, good: QuantizedModel, layer: str, fault: Fault, setting: Setting) -> QuantizedModel:
    """``model`` is the full-precision one."""
    weight = model.module.get_submodule(layer).weight
    return QuantizedModel({**good.linears, layer: fault(good.linears[layer], weight, setting)})


def cell(setting: str, tasks: Sequence[str], method: str = "rtn") -> Cell:
    return Cell(
        model="tiny", model_path="/models/tiny", weights_sha256="a" * 64, method=method, method_source=method,
        method_sha256="b" * 64, options={}, setting=setting, dtype="float32", device="cpu", seed=0,
        calibration="pydoc:4x64", calibration_sha256="c" * 64, tasks=tuple(tasks), data_root=None,
    )  # fmt: skip


def write_run(
    path: Path,
    found: Sequence[tuple[Cell, Sequence[TaskResult]]],
    *,
    status: str = "ok",
    bits: float = 4.25,
    seconds: Sequence[float] | None = None,
    provenance: str = '{"processor": "one"}',
    integers: Mapping[str, QuantizedModel] | None = None,
) -> Path:
    """A run folder as the supervisor leaves it: a plan, a store, the tasks' files of every cell, and its integers.

    ``integers``: by setting, if there are to be any.
    """
    facts = {"tiny": ModelFacts(Path("/models/tiny"), "a" * 64, "c" * 64)}
    terms = {"calibration": "pydoc:4x64", "seed": "0", "dtype": "float32", "device": "cpu"}
    folder = RunFolder(path)
    write_plan(folder.plan, Plan(terms, facts, tuple(one for one, _ in found)))
    store = Store(folder.store)
    store.begin(Run(WHEN, "{}", provenance))
    for number, (one, results) in enumerate(found):
        rows = []
        for result in results:
            write_result(folder.cell(one.id).tasks, result)
            rows += [
                Measured(one.id, result.task, m.metric, m.value, m.stderr, m.n, int(m.higher_is_better), 1.0, WHEN)
                for m in result.measurements
            ]
        if rows:
            store.add_measured(rows)
        took = seconds[number] if seconds else 2.0
        if integers is not None:
            integers[one.setting].save(folder.cell(one.id).quantized)
        reason = None if status == "ok" else "a scale is not a finite positive number"
        store.add_attempt(Attempt(one.id, 1, 1, status, reason, 0, 1.0, took, 3.0, 10**9, bits, 10**8, WHEN))
    store.close()
    return path
