"""The harness from Python: what the command line does, as functions.

quantized = harness.quantize(model, tokenizer, method="gptq:damp=0.05", setting="W4A16g64")
for result in harness.evaluate(model, tokenizer, tasks=["pydoc"], quantized=quantized): ...
rows = harness.run(methods=["rtn", "gptq"], models=["smollm2-135m"], settings=["W4A16g64"], tasks=["pydoc"])
frame = harness.measurements("runs/first", "runs/second")
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError, Problems, Unsupported
from harness.progress import Progress, silent

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harness.cells import Execution
    from harness.models import LoadedModel
    from harness.quantized import QuantizedModel
    from harness.tasks.measurement import TaskResult


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    setting: str,
    calibration: str = "pydoc:32x512",
    data_root: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> QuantizedModel:
    """The integers of ``model``, which itself is left as it was.

    ``method`` is a name or a file with options, as on the command line. Raises HarnessError for what is not understood,
    Unsupported where method, setting and model do not go together, BadOutput where numbers are not finite.
    """
    from harness.calibration import CalibrationSpec
    from harness.registry import method_class
    from harness.settings import Setting

    _, create = method_class(method)
    wanted, spec, made = Setting.parse(setting), CalibrationSpec.parse(calibration), create()
    if reason := made.supports(wanted):
        raise Unsupported(reason)
    root = Path(data_root) if data_root else None
    loaded = _loaded(model, tokenizer)

    import torch

    from harness.calibration import calibration_ids
    from harness.driver import quantize_model

    ids = torch.from_numpy(calibration_ids(spec, tokenizer, root, seed)) if made.reads else None
    with tempfile.TemporaryDirectory() as windows:
        return quantize_model(loaded, made, wanted, ids, seed=seed, checkpoints=Path(windows), progress=progress)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    quantized: QuantizedModel | None = None,
    data_root: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[TaskResult]:
    """Results on ``tasks`` (names with options), of ``model`` or of a copy of it with ``quantized`` in it.

    Raises HarnessError for unknown tasks and missing data, BadOutput for numbers that are not finite.
    """
    from harness.tasks.catalogue import parse_task, task_problems
    from harness.tasks.evaluate import evaluate as score

    specs = [parse_task(task) for task in tasks]
    root = Path(data_root).resolve() if data_root else None
    if problems := list(task_problems(specs, root)):
        raise Problems(problems)
    plain = _loaded(model, tokenizer)
    if quantized is None:
        return list(score(specs, plain, reference=None, data_root=root, seed=seed, progress=progress))
    scored = _loaded(copy.deepcopy(model), tokenizer)
    quantized.install(scored.module, scored.architecture)
    return list(score(specs, scored, reference=lambda: plain, data_root=root, seed=seed, progress=progress))


def run(file: str | Path | None = None, *, retry: bool = False, **keys: Any) -> list[dict[str, Any]]:
    """``harness run``: every cell in a process of its own; resumes a run that was stopped. One row per measurement.

    ``keys`` are those of :class:`harness.request.Request`: ``methods=["rtn"]``, ``models``, ``settings``, ``tasks``,
    ``calibration``, ``out``, …; ``file`` is a TOML file with the same. Raises Problems for all that is wrong, at once;
    what goes wrong in a cell is its row's status.
    """
    from harness import plan, request, results, running
    from harness.display import watching
    from harness.runfolder import RunFolder

    known = request.Request.__dataclass_fields__
    if wrong := [key for key in keys if key not in known]:
        raise HarnessError(f"unknown key {wrong[0]!r}", fix=f"keys: {', '.join(known)}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    read = request.read_toml(Path(file)) if file else request.FileKeys({}, ())
    asked = request.request_from(read.values, given)
    folder = Path(asked.out or f"runs/{asked.name}")
    with watching() as watcher:
        limits = running.limits_of(asked)
        running.run(plan.draft(asked, read.problems), asked, RunFolder(folder), limits, watcher, retry=retry)
    return list(results.measurement_rows(results.load(folder)))


def measurements(*runs: str | Path) -> pd.DataFrame:
    """The rows of ``harness results`` of run folders as a table of pandas, the column ``run`` before them.

    Raises HarnessError where there is no run.
    """
    import pandas as pd

    from harness import results

    rows = [{"run": str(run), **row} for run in runs for row in results.measurement_rows(results.load(Path(run)))]
    return pd.DataFrame(rows)


def load(path: str | Path, device: str = "cpu", execute: Execution = "simulation") -> LoadedModel:
    """A model that ``harness export --format native`` wrote, ready to run.

    ``execute``: on the values that its integers stand for, or on its packed integers by the kernels of ``device``.
    Raises HarnessError for a folder that is not one, Unsupported where a layer has no kernel there.
    """
    from harness.export.native import load as load_native

    return load_native(Path(path), device, execute)


def _loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    from harness.models import LoadedModel

    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, str(model.config.name_or_path or type(model).__name__), Path())
