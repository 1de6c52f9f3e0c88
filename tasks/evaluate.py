"""Score a model on tasks, one result after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.models import LoadedModel
from harness.progress import Progress
from harness.tasks.catalogue import TaskSpec
from harness.tasks.measurement import TaskResult, read_result, write_result
from harness.tasks.perplexity import evaluation_windows, measure_windows

if TYPE_CHECKING:
    from harness.kernels.difference import Executions

__all__ = ["evaluate", "read_result", "write_result"]


def evaluate(
    specs: Sequence[TaskSpec],
    model: LoadedModel,
    *,
    reference: Callable[[], LoadedModel] | None,
    data_root: Path | None,
    seed: int,
    progress: Progress,
    executions: Callable[[], Executions] | None = None,
) -> Iterator[TaskResult]:
    """Yields each task's result once it is final, in the order of ``specs`` but for tasks that share forward passes.

    Perplexity and KL tasks of one corpus and length share them. ``reference`` loads the full-precision model and is
    called at most once, only for a KL task; None means that ``model`` is it. ``executions`` is called for the tasks
    that compare kernels with their simulation; None where nothing is quantized. Raises BadOutput for numbers that are
    not finite, HarnessError for data that is missing.
    """
    reference = functools.cache(reference) if reference is not None else None
    for group in _sharing_a_pass(specs):
        if group[0].kind == "lm_eval":
            # Imported when asked for: the library takes a second to load.
            from harness.tasks.lm_eval import run_lm_eval

            yield run_lm_eval(group[0], model, data_root, seed, progress)
        elif group[0].kind == "kernels":
            assert executions is not None, "a model that is not quantized has no kernels to compare"
            yield _kernel_difference(group[0], model, executions(), data_root, progress)
        else:
            yield from measure_windows(group, model, reference, data_root, progress)


def _kernel_difference(
    spec: TaskSpec, model: LoadedModel, executions: Executions, data_root: Path | None, progress: Progress
) -> TaskResult:
    from harness.kernels.difference import measure_difference

    windows = evaluation_windows(spec.corpus, spec.count("length") or 0, spec.count("windows"), model, data_root)
    return measure_difference(
        spec.key, model.module, executions, windows.ids, windows.manifest, lambda n, of: progress(spec.name, n, of)
    )


def _sharing_a_pass(specs: Sequence[TaskSpec]) -> list[list[TaskSpec]]:
    groups: dict[object, list[TaskSpec]] = {}
    for spec in specs:
        windows = (spec.corpus, spec.options["length"]) if spec.kind in ("perplexity", "kl") else spec.key
        groups.setdefault(windows, []).append(spec)
    return list(groups.values())
