"""The tasks there are, and what a task's text (``wikitext2:windows=16``) means; imports nothing heavy.

``<corpus>`` is token perplexity, ``<corpus>_kl`` divergence from the full-precision model, ``<corpus>_kernels`` the
difference between kernels and simulation, every other name lm-eval's
(whose own ``c4`` is hidden by ours).
lm-eval's tasks are found in its package folder without importing it: its YAML files are read for their names once and
the index is kept in the cache folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.corpora import CORPORA, corpus_problem
from harness.errors import HarnessError, unknown
from harness.specs import Option, Scalar, Spec, bind, canonical, options_of
from harness.tasks import lm_eval_index
from harness.tasks.presets import PRESETS

Kind = Literal["perplexity", "kl", "kernels", "lm_eval"]
KL_SUFFIX, KERNELS_SUFFIX = "_kl", "_kernels"

OFFLINE_TASKS = {
    "pydoc_cloze": "which of four sentences comes next in Python's documentation (test part of pydoc)",
    "pydoc_words": "word perplexity by lm-eval's definition on the test part of pydoc",
}
"""Tasks of ours that run through the lm-eval adapter and need no data."""


@dataclass(frozen=True)
class WindowOptions:
    """Options of ``<corpus>`` and ``<corpus>_kl``."""

    windows: int | None = field(default=None, metadata={"help": "how many windows, from the first; none: all"})
    length: int = field(default=2048, metadata={"help": "tokens in a window"})


@dataclass(frozen=True)
class LmEvalOptions:
    """Options of every task that runs through lm-eval."""

    limit: int | None = field(default=None, metadata={"help": "how many documents a task, from the first; none: all"})
    fewshot: int | None = field(default=None, metadata={"help": "examples in the prompt; none: the task's own number"})
    bos: bool | None = field(
        default=None, metadata={"help": "begin every prompt with the BOS token; none: as the tokenizer does"}
    )
    chat: bool = field(default=False, metadata={"help": "put the prompts into the model's chat template"})


_LEAST = {"windows": 1, "length": 2, "limit": 1, "fewshot": 0}


@dataclass(frozen=True)
class TaskSpec:
    """A task with its options. ``options`` holds all of them, ``key`` (the canonical text) only those not default."""

    name: str
    options: dict[str, Scalar]
    kind: Kind
    key: str

    @property
    def corpus(self) -> str:
        """The corpus that a perplexity, KL or kernels task reads."""
        return self.name.removesuffix(KL_SUFFIX).removesuffix(KERNELS_SUFFIX)

    def count(self, option: str) -> int | None:
        """An option that counts something."""
        value = self.options[option]
        return None if value is None else int(value)


@dataclass(frozen=True)
class TaskInfo:
    name: str
    summary: str
    options: tuple[Option, ...]


def parse_task(text: str) -> TaskSpec:
    """Read ``piqa:limit=100:fewshot=0``. Raises HarnessError for an unknown name, option or value."""
    spec = Spec.parse(text)
    kind = _kind(spec.name)
    options = options_of(LmEvalOptions if kind == "lm_eval" else WindowOptions)
    given = bind(options, spec)
    for name, value in given.items():
        if name in _LEAST and isinstance(value, int) and value < _LEAST[name]:
            raise HarnessError(f"{text!r}: {name}={value} is too small", fix=f"at least {name}={_LEAST[name]}")
    return TaskSpec(
        name=spec.name,
        options={option.name: option.default for option in options} | given,
        kind=kind,
        key=canonical(spec.name, given),
    )


def describe_tasks() -> list[TaskInfo]:
    """Our own tasks, then one line that stands for lm-eval's (``lm_eval_index.names()`` lists those)."""
    windows, documents = options_of(WindowOptions), options_of(LmEvalOptions)
    infos = [TaskInfo(name, f"token perplexity on {corpus.summary}", windows) for name, corpus in CORPORA.items()]
    infos += [
        TaskInfo(name + KL_SUFFIX, f"KL divergence from the full-precision model, on {corpus.summary}", windows)
        for name, corpus in CORPORA.items()
    ]
    infos += [
        TaskInfo(name + KERNELS_SUFFIX, f"difference between kernels and simulation, on {corpus.summary}", windows)
        for name, corpus in CORPORA.items()
    ]
    infos += [TaskInfo(name, summary, documents) for name, summary in OFFLINE_TASKS.items()]
    infos.append(TaskInfo("<lm-eval task or group>", "any, by its own name: piqa, arc_easy, mmlu …", documents))
    return infos


def task_problems(specs: Sequence[TaskSpec], data_root: Path | None) -> list[HarnessError]:
    """What is missing on disk for these tasks, by looking at paths only."""
    problems: dict[str, HarnessError] = {}
    for spec in specs:
        if spec.kind == "lm_eval":
            found = _lm_eval_problems(spec, data_root)
        else:
            problem = corpus_problem(spec.corpus, CORPORA[spec.corpus].evaluation_split, data_root)
            found = [problem] if problem else []
        problems |= {str(problem): problem for problem in found}
    return list(problems.values())


def _kind(name: str) -> Kind:
    if name in CORPORA:
        return "perplexity"
    if name.endswith(KL_SUFFIX) and name.removesuffix(KL_SUFFIX) in CORPORA:
        return "kl"
    if name.endswith(KERNELS_SUFFIX) and name.removesuffix(KERNELS_SUFFIX) in CORPORA:
        return "kernels"
    if name in OFFLINE_TASKS or lm_eval_index.is_known(name):
        return "lm_eval"
    derived = (corpus + suffix for corpus in CORPORA for suffix in (KL_SUFFIX, KERNELS_SUFFIX))
    own = [*CORPORA, *derived, *OFFLINE_TASKS, *PRESETS]
    raise unknown("task", name, [*own, *lm_eval_index.names()], listing="harness list tasks")


def _lm_eval_problems(spec: TaskSpec, data_root: Path | None) -> list[HarnessError]:
    """Dataset folders that the data root lacks; a folder there without the split read shows when the task loads."""
    if spec.name in OFFLINE_TASKS or data_root is None:
        return []
    if not data_root.is_dir():
        return [HarnessError("the data root is not a folder", where=str(data_root), fix="correct --data-root")]
    return [
        HarnessError(
            f"the data root has no {repository}, which task {spec.name} reads",
            where=str(data_root / repository),
            fix=f"put the hub's {repository} there, or leave --data-root out to use the hub",
        )
        for repository in lm_eval_index.datasets_of(spec.name)
        if not (data_root / repository).is_dir()
    ]
