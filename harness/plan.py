"""From the user's words to the cells of a run. Everything that can be wrong is found before anything is computed.

Two steps: :func:`draft` needs only what lies on this machine and imports nothing heavy; :func:`complete` adds what
:mod:`harness.prepare` finds out in a process of its own (models fetched, calibration tokens), so that cells have ids.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from harness.calibration import CalibrationSpec, calibration_problem
from harness.cells import BASELINE, EXECUTIONS, Cell, Execution
from harness.checkpoint import Checkpoint, open_checkpoint
from harness.errors import HarnessError, Problems
from harness.executors.choice import executor_problems
from harness.limits import parse_bytes
from harness.planfile import ModelFacts
from harness.presets import ModelSource, resolve_model
from harness.provenance import default_device
from harness.registry import MethodInfo, describe_methods, find_method, is_path
from harness.request import Request
from harness.settings import FULL_PRECISION, Setting
from harness.specs import Scalar, Spec, bind, canonical
from harness.tasks.catalogue import KERNELS_SUFFIX, TaskSpec, parse_task, task_problems
from harness.tasks.presets import expand

DTYPES = ("default", "float32", "bfloat16", "float16", "checkpoint")
DEVICES = ("auto", "cpu", "cuda")
_LEAST_GROUP = 8  # smaller groups are legal when they divide, but not worth offering

_T = TypeVar("_T")


@dataclass(frozen=True)
class MethodChoice:
    """A method with its options."""

    info: MethodInfo
    source: str
    options: Mapping[str, Scalar]

    @property
    def label(self) -> str:
        return canonical(self.info.name, self.options)


@dataclass(frozen=True)
class Draft:
    """A request that is understood and free of every mistake that can be seen without computing."""

    models: tuple[ModelSource, ...]
    methods: tuple[MethodChoice, ...]  # without the baseline
    settings: tuple[Setting, ...]
    tasks: tuple[TaskSpec, ...]
    calibration: CalibrationSpec
    data_root: Path | None
    seed: int
    dtype: str
    device: str
    execute: Execution
    warnings: tuple[str, ...]


def draft(request: Request, known: Iterable[HarnessError] = ()) -> Draft:
    """Understand a request. Raises Problems with all that is wrong, at once; ``known`` is what its file has of it."""
    problems = list(known)

    def each(texts: Sequence[str], read: Callable[[str], _T]) -> tuple[_T, ...]:
        return tuple(_tried(problems, read, text) for text in texts if text)  # type: ignore[misc]  # see _tried

    infos = describe_methods()
    methods = _present(each(request.methods, lambda text: _method(text, infos)))
    models = _present(each(request.models, resolve_model))
    settings = _present(each(request.settings, Setting.parse))
    tasks = _present(each(_expanded(request, problems), lambda text: _task(text, request)))
    if request.execute == "kernels":
        tasks = _with_difference(tasks)
    calibration = _tried(problems, CalibrationSpec.parse, request.calibration)
    data_root = Path(request.data_root).expanduser().resolve() if request.data_root else None

    problems += _empty(request)
    problems += _doubles("method", [method.label for method in methods])
    problems += _doubles("model", [model.name for model in models])
    problems += _doubles("setting", [str(setting) for setting in settings])
    problems += _doubles("task", [task.key for task in tasks])
    problems += _wrong_words(request)
    problems += executor_problems(request.executor, request.address, request.artifacts)
    problems += _data_problems(tasks, calibration, data_root)
    for model in models:
        if model.path is not None:
            problems += model_problems(model.path, model.name, settings)
    if problems or calibration is None:
        raise Problems(problems)
    execute: Execution = "kernels" if request.execute == "kernels" else "simulation"
    device = default_device() if request.device == "auto" else request.device
    dtype = request.dtype if request.dtype != "default" else "float32" if device == "cpu" else "checkpoint"
    quantizing = tuple(method for method in methods if method.info.name != BASELINE)
    return Draft(
        models, quantizing, settings, tasks, calibration, data_root, request.seed, dtype, device, execute,
        warnings=tuple(_grid_warnings(models, settings)),
    )  # fmt: skip


def complete(draft: Draft, facts: Mapping[str, ModelFacts]) -> list[Cell]:
    """The cells in the order they run: by model, then setting, then method; the baseline of a model first.

    Raises Problems for what only a fetched model shows.
    """
    problems = [
        problem
        for model in draft.models
        if model.path is None
        for problem in model_problems(facts[model.name].path, model.name, draft.settings)
    ]
    cells = [cell for model in draft.models for cell in _cells_of(draft, model.name, facts[model.name])]
    same = Counter(cell.id for cell in cells)
    problems += [
        HarnessError(f"{cell.model}, {cell.label}, {cell.setting} is in the plan under two names", fix="name it once")
        for cell in cells
        if same[cell.id] > 1
    ]
    if problems:
        raise Problems(problems)
    return cells


def model_problems(path: Path, name: str, settings: Iterable[Setting]) -> list[HarnessError]:
    """An unreadable checkpoint, or groups that do not divide its layers."""
    try:
        checkpoint = open_checkpoint(path)
    except HarnessError as error:
        return [error]
    return [problem for setting in settings for problem in _group_problems(checkpoint, name, setting)]


def pairs(draft: Draft) -> list[tuple[MethodChoice | None, Setting]]:
    """What is run on every model, in order; None is the baseline."""
    return [(None, FULL_PRECISION), *((method, setting) for setting in draft.settings for method in draft.methods)]


def _cells_of(draft: Draft, name: str, facts: ModelFacts) -> list[Cell]:
    baseline = describe_methods()[BASELINE]
    return [
        Cell(
            model=name,
            model_path=str(facts.path),
            weights_sha256=facts.weights_sha256,
            method=method.info.name if method else BASELINE,
            method_source=method.source if method else BASELINE,
            method_sha256=method.info.sha256 if method else baseline.sha256,
            options=dict(method.options) if method else {},
            setting=str(setting),
            dtype=draft.dtype,
            device=draft.device,
            seed=draft.seed,
            calibration=str(draft.calibration),
            calibration_sha256=facts.calibration_sha256 if method else None,
            tasks=tuple(task.key for task in draft.tasks if method or task.kind != "kernels"),
            data_root=str(draft.data_root) if draft.data_root else None,
            execute=draft.execute,
        )
        for method, setting in pairs(draft)
    ]


def _tried(problems: list[HarnessError], read: Callable[[str], _T], text: str) -> _T | None:
    """What ``read`` makes of the text; its complaint joins the others."""
    try:
        return read(text)
    except HarnessError as error:
        problems.append(error)
        return None


def _present(values: Iterable[_T | None]) -> tuple[_T, ...]:
    return tuple(value for value in values if value is not None)


def _method(text: str, infos: Mapping[str, MethodInfo]) -> MethodChoice:
    spec = Spec.parse(text)
    info = find_method(spec.name, infos)
    source = str(Path(spec.name).resolve()) if is_path(spec.name) else info.name
    return MethodChoice(info, source, bind(info.options, Spec(info.name, spec.options)))


def _expanded(request: Request, problems: list[HarnessError]) -> tuple[str, ...]:
    try:
        return expand(request.tasks)
    except HarnessError as error:
        problems.append(error)
        return ()


def _task(text: str, request: Request) -> TaskSpec:
    """``--limit`` and ``--apply-chat-template`` hold for tasks that take the option and do not say it themselves."""
    task = parse_task(text)
    said = dict(Spec.parse(text).options)
    if request.limit is not None and "limit" in task.options and "limit" not in said:
        text += f":limit={request.limit}"
    if request.apply_chat_template and "chat" in task.options and "chat" not in said:
        text += ":chat=true"
    return parse_task(text)


def _with_difference(tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
    """What runs through kernels is compared with its simulation; where no task does so, on the first corpus named."""
    if any(task.kind == "kernels" for task in tasks):
        return tasks
    corpus = next((task.corpus for task in tasks if task.kind != "lm_eval"), "pydoc")
    return *tasks, parse_task(f"{corpus}{KERNELS_SUFFIX}:windows=4:length=512")


def _empty(request: Request) -> list[HarnessError]:
    wanted = {
        "methods": ("no method is named", "--methods rtn (`harness list methods` shows what there is)"),
        "models": ("no model is named", "--models smollm2-135m (`harness list models` shows what there is)"),
        "settings": ("no setting is named", "--settings W4A16,W4A8"),
    }
    return [
        HarnessError(what, fix=f"add {fix}") for name, (what, fix) in wanted.items() if not any(getattr(request, name))
    ]


def _doubles(kind: str, names: Sequence[str]) -> list[HarnessError]:
    counts = Counter(names)
    return [HarnessError(f"{kind} {name!r} is named twice", fix="name it once") for name in counts if counts[name] > 1]


def _wrong_words(request: Request) -> list[HarnessError]:
    problems: list[HarnessError] = []
    for flag, value, legal in (
        ("dtype", request.dtype, DTYPES),
        ("device", request.device, DEVICES),
        ("execute", request.execute, EXECUTIONS),
    ):
        if value not in legal:
            problems.append(HarnessError(f"--{flag} {value!r} is not offered", fix=f"choose from {', '.join(legal)}"))
    for flag, number, least in (
        ("jobs", request.jobs, 1), ("threads", request.threads, 1), ("limit", request.limit, 1),
        ("seed", request.seed, 0),
    ):  # fmt: skip
        if number is not None and number < least:
            problems.append(HarnessError(f"--{flag} {number} is too small", fix=f"at least {least}"))
    if request.memory is not None:
        _tried(problems, parse_bytes, request.memory)
    if request.timeout is not None and not 0 < request.timeout < math.inf:
        problems.append(HarnessError(f"--timeout {request.timeout} is no time", fix="give seconds, more than 0"))
    return problems


def _data_problems(
    tasks: Sequence[TaskSpec], calibration: CalibrationSpec | None, data_root: Path | None
) -> list[HarnessError]:
    """What is missing on disk; once, where several tasks miss the same."""
    if data_root is not None and not data_root.is_dir():
        return [HarnessError("the data root is not a folder", where=str(data_root), fix="correct --data-root")]
    found = task_problems(tasks, data_root)
    missing = calibration_problem(calibration, data_root) if calibration else None
    return list({str(problem): problem for problem in [*found, *([missing] if missing else [])]}.values())


def _group_problems(checkpoint: Checkpoint, name: str, setting: Setting) -> list[HarnessError]:
    widths = {shape[1] for shape in checkpoint.block_linears().values()}
    group = setting.group_size
    if group is None or all(width % group == 0 for width in widths):
        return []
    common = math.gcd(*widths)
    legal = [size for size in range(_LEAST_GROUP, common + 1) if common % size == 0]
    return [
        HarnessError(
            f"setting {str(setting)!r}: groups of {group} do not divide the layers of {name}, "
            f"which have {', '.join(map(str, sorted(widths)))} inputs",
            fix=f"choose g from {', '.join(map(str, legal))}, or leave g out for one group per output channel",
        )
    ]


def _grid_warnings(models: Iterable[ModelSource], settings: Iterable[Setting]) -> Iterable[str]:
    """Weights that were quantized before look lossless on their own grid."""
    for model in models:
        grid = model.preset.grid_group if model.preset else None
        for setting in settings:
            if grid is not None and setting.group_size is not None and grid % setting.group_size == 0:
                yield (
                    f"{model.name} at {setting}: its weights already lie on a 4-bit grid of groups of {grid}, "
                    "so rounding there looks lossless; take larger groups"
                )
