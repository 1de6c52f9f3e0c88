"""lm-eval's own task definitions, loaded without its 10 s index and, with a data root, without a network."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from harness.errors import HarnessError, Unsupported
from harness.paths import cache_dir
from harness.tasks import pydoc_cloze, pydoc_words
from harness.tasks.catalogue import TaskSpec
from harness.tasks.lm_eval_index import definition_files

_OFFLINE = {"pydoc_cloze": pydoc_cloze.config, "pydoc_words": pydoc_words.config}


def load_tasks(spec: TaskSpec, data_root: Path | None) -> dict[str, Any]:
    """lm-eval's ``tasks``, ``groups`` and ``group_map`` of the spec's name, with the number of few-shot examples set.

    Raises HarnessError when a dataset cannot be loaded or has no split for examples, Unsupported for a task that runs
    generated code or looks at images.
    """
    datasets.disable_progress_bars()  # the worker tells its progress itself
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle as they load: seeded as by lm_eval.simple_evaluate
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        with _datasets_from(data_root), mock.patch.object(ConfigurableTask, "fewshot_docs", _fewshot_docs_at_hand):
            loaded = _load(spec.name)
    except (OSError, KeyError, ValueError, ImportError) as error:  # what datasets and task definitions raise
        raise HarnessError(
            f"task {spec.name} cannot be loaded: {type(error).__name__}: {error}",
            where=None if data_root is None else str(data_root),
            fix="check that the data root has the task's dataset and split, or that the hub can be reached",
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise Unsupported(f"task {name} runs generated code or needs more than text", fix="leave the task out")
        _set_fewshot(name, task, spec.options["fewshot"])
    return loaded


def _load(name: str) -> dict[str, Any]:
    if name in _OFFLINE:
        return dict(TaskManager(include_defaults=False).load([_OFFLINE[name]()]))
    # Where two folders define one name, the last path counts here, but the first file in lm-eval's own index.
    folders = sorted({path.parent for path in definition_files(name).values()}, reverse=True)
    return dict(TaskManager(include_defaults=False, include_path=folders).load([name]))


def _set_fewshot(name: str, task: Any, asked: Any) -> None:
    """As lm-eval does it, but where lm-eval keeps the 0 of a definition whatever is asked, this refuses."""
    own = task.get_config("num_fewshot")
    if asked and own == 0:
        raise HarnessError(f"task {name} is defined without examples", fix=f"ask for {name}:fewshot=0")
    shots = (own or 0) if asked is None else asked
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if shots and not hasattr(task, "sampler"):
        raise HarnessError(
            f"task {name} has no split at hand to take {shots} examples from",
            fix=f"put the dataset's other splits into the data root, or ask for {name}:fewshot=0",
        )


_fewshot_docs = ConfigurableTask.fewshot_docs


def _fewshot_docs_at_hand(task: ConfigurableTask) -> Any:
    """The documents examples are taken from; None, which lm-eval takes for "no examples", if their split is missing."""
    try:
        return _fewshot_docs(task)
    except KeyError as error:
        if error.args[0] in task.dataset:
            raise
        return None


@contextlib.contextmanager
def _datasets_from(data_root: Path | None) -> Iterator[None]:
    """While this lasts ``datasets`` finds ``owner/name`` below the data root, and nowhere else.

    It looks in the current folder before the hub. Its converted copies go to the harness's cache, as the data root may
    be read-only.
    """
    if data_root is None:
        yield
        return
    cache = cache_dir().resolve() / "datasets"
    with (
        mock.patch.multiple(datasets.config, HF_DATASETS_CACHE=cache, HF_HUB_OFFLINE=True),
        contextlib.chdir(data_root),
    ):
        yield
