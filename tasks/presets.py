"""Names for sets of tasks: ``zeroshot6``, and what the methods' papers ran, with the metric that they report.

A preset stands for its tasks wherever tasks are named; options after it go to all of them: ``zeroshot6:limit=100``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.specs import Spec


@dataclass(frozen=True)
class Preset:
    """``tasks``: each with the metric that its table shows."""

    summary: str
    tasks: Mapping[str, str]


_PERPLEXITIES = {"wikitext2": "token_perplexity", "c4": "token_perplexity"}
_MMLU = {"mmlu:fewshot=5": "acc"}

PRESETS: Mapping[str, Preset] = {
    "ppl": Preset("token perplexity, GPTQ protocol, windows of 2048", _PERPLEXITIES),
    "zeroshot6": Preset(
        "six zero-shot tasks of common sense",
        {
            "piqa": "acc_norm", "arc_easy": "acc_norm", "arc_challenge": "acc_norm", "hellaswag": "acc_norm",
            "winogrande": "acc", "boolq": "acc",
        },
    ),
    "mmlu": Preset("57 subjects, five examples each", _MMLU),
    "paper-duquant": Preset(
        "DuQuant (NeurIPS 2024): perplexities, six zero-shot tasks without BOS, MMLU with none and five examples",
        {
            **_PERPLEXITIES, "piqa:bos=false": "acc_norm", "arc_easy:bos=false": "acc_norm",
            "arc_challenge:bos=false": "acc_norm", "boolq:bos=false": "acc", "hellaswag:bos=false": "acc_norm",
            "winogrande:bos=false": "acc", "mmlu:fewshot=0": "acc", **_MMLU,
        },
    ),
    "paper-cbq": Preset(
        "CBQ (ICLR 2025): perplexities, PIQA, HellaSwag, ARC, Mutual, Ethics",
        {
            **_PERPLEXITIES, "piqa": "acc", "hellaswag": "acc", "arc_challenge": "acc", "arc_easy": "acc",
            "mutual": "r@1", "hendrycks_ethics": "acc",
        },
    ),
    "paper-adadim": Preset(
        "AdaDim (ICLR 2024): WikiText-2, four zero-shot tasks, MMLU with five examples",
        {
            "wikitext2": "token_perplexity", "piqa": "acc", "hellaswag": "acc", "winogrande": "acc",
            "arc_easy": "acc", **_MMLU,
        },
    ),
}  # fmt: skip


def expand(texts: Iterable[str]) -> tuple[str, ...]:
    """Presets replaced by their tasks, each once; options after a preset's name win over those of its tasks.

    A preset may bear the name of a task: ``mmlu`` is the group of that name with five examples. Raises HarnessError
    for options that cannot be read.
    """
    expanded: list[str] = []
    for text in texts:
        name = text.partition(":")[0]
        if name in PRESETS:
            given = dict(Spec.parse(text).options)
            tasks = [_with_options(task, given) for task in PRESETS[name].tasks]
            expanded += [task for task in dict.fromkeys(tasks) if task not in expanded]
        else:
            expanded.append(text)
    return tuple(expanded)


def _with_options(task: str, given: Mapping[str, str]) -> str:
    own = Spec.parse(task)
    options = {**dict(own.options), **given}
    return ":".join([own.name, *(f"{key}={value}" for key, value in options.items())])
