"""The one adapter to lm-eval: any task or group of its, by its own definitions, with every document's outcome kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM

from harness.diagnose import first_not_finite
from harness.errors import BadOutput, HarnessError
from harness.models import LoadedModel, tokenizer_sha256
from harness.progress import Progress
from harness.specs import Scalar
from harness.tasks.catalogue import TaskSpec
from harness.tasks.lm_eval_loading import load_tasks
from harness.tasks.measurement import Array, Measurement, TaskResult
from harness.tasks.prefix_tree import Request
from harness.tasks.scoring import Scorer

BATCH_SIZE = 8  # of generation
_PROBE = torch.arange(32)[None]  # any tokens: broken weights spoil them all
_ACCURACIES = ("acc", "acc_norm")
BOOTSTRAP_ITERATIONS = 1000  # for metrics whose standard error has no closed form; lm-eval's default takes minutes

Samples = Sequence[dict[str, Any]]


class SharingLM(HFLM):  # type: ignore[misc]
    """A model in memory under lm-eval's tokenization, chat templates and generation; the scoring is our own.

    Tells how far it is and refuses what is not finite.
    """

    def __init__(self, model: LoadedModel, watch: Callable[[int, int], None], *, bos: bool | None = None) -> None:
        """``bos``: whether every prompt begins with the BOS token; None: as the tokenizer does."""
        super().__init__(
            pretrained=model.module, tokenizer=model.tokenizer, batch_size=BATCH_SIZE, softmax_dtype="float32",
            add_bos_token=bos,
        )  # fmt: skip
        if bos is not None and self.begins_with_bos != bos:
            raise HarnessError(
                f"the tokenizer of {model.name} {'adds no' if bos else 'always adds a'} BOS token, whatever it is told",
                fix="leave the option bos out, and compare with runs that do the same",
            )
        self.scorer = Scorer.of(model)
        self._watch = watch
        self._done = self._total = 0

    @property
    def begins_with_bos(self) -> bool:
        """Found out by encoding something."""
        return bool(self.tok_encode("a")[:1] == [self.tokenizer.bos_token_id])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._begin(requests)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        _refuse_not_finite(self.model, [likelihood for likelihood, _ in answers], requests)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._begin(requests)
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        _refuse_not_finite(self.model, answers, requests)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._begin(requests)
        hook = self.model.register_forward_hook(_refuse_logits_not_finite)
        try:
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        finally:
            hook.remove()
        return answers

    def _begin(self, requests: list[Instance]) -> None:
        self._done, self._total = 0, len(requests)
        self._advance(0)

    def _advance(self, by: int) -> None:
        self._done = min(self._done + by, self._total)
        self._watch(self._done, self._total)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        wanted = [Request.of(context, continuation, self.max_length) for _, context, continuation in requests]
        return self.scorer.score(wanted, self._advance)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return tokens


def run_lm_eval(
    spec: TaskSpec, model: LoadedModel, data_root: Path | None, seed: int, progress: Progress
) -> TaskResult:
    """Score the model on an lm-eval task, group or tag.

    ``seed`` decides sampled generations only; documents and few-shot examples are the same for every seed. Raises what
    :func:`load_tasks` raises, BadOutput for a log-likelihood that is not finite.
    """
    loaded = load_tasks(spec, data_root)
    chat, limit = bool(spec.options["chat"]), spec.options["limit"]
    if chat and not model.tokenizer.chat_template:
        raise HarnessError(f"{model.name} has no chat template", fix="leave --apply-chat-template out")
    lm = SharingLM(model, lambda done, of: progress(spec.name, done, of), bos=_flag(spec.options["bos"]))
    torch.manual_seed(seed)
    started = time.monotonic()
    try:
        with mock.patch.dict(os.environ, DISABLE_MULTIPROC="1"):  # lm-eval would fork a pool to bootstrap
            results = lm_eval_evaluate(
                lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS,
                apply_chat_template=chat, fewshot_as_multiturn=chat,
            )  # fmt: skip
    except OverflowError as error:
        raise BadOutput(f"task {spec.name}: a metric is beyond floating point ({error})") from error
    seconds = time.monotonic() - started
    measurements = _measurements(results, loaded, spec.name)
    manifest = _manifest(results, loaded, lm, spec) | {"guessing": _guessing(measurements)}
    return TaskResult(spec.key, measurements, seconds, manifest)


def _flag(value: Scalar) -> bool | None:
    return None if value is None else bool(value)


def _measurements(results: dict[str, Any], loaded: dict[str, Any], asked: str) -> tuple[Measurement, ...]:
    """Those of what was asked for under the metrics' names, those of its members as ``member/metric``; groups first."""

    def prefix(name: str) -> str:
        return "" if name == asked else f"{name}/"

    tasks = [one for name in loaded["tasks"] for one in _task_measurements(results, name, prefix(name))]
    by_metric = {measurement.metric: measurement for measurement in tasks}
    groups = [
        one
        for name, group in loaded.get("groups", {}).items()
        for one in _group_measurements(results, group, prefix(name), by_metric)
    ]
    return (*groups, *tasks)


def _task_measurements(results: dict[str, Any], name: str, prefix: str) -> list[Measurement]:
    measurements = []
    outcomes: dict[tuple[str, int], dict[str, Array]] = {}  # shared by metrics over the same documents
    for metric, filter_name, value, stderr in _numbers(results["results"][name]):
        samples = [s for s in results["samples"][name] if s["filter"] == filter_name and metric in s]
        documents = (filter_name, len(samples))
        if documents not in outcomes:
            outcomes[documents] = _outcomes(samples)
        better = results["higher_is_better"][name].get(metric)
        measurements.append(
            Measurement(
                metric=prefix + _metric_name(metric, filter_name),
                value=value,
                stderr=stderr,
                n=len(samples),
                higher_is_better=True if better is None else bool(better),
                samples=outcomes[documents] | _values(samples, metric),
            )
        )
    return measurements


def _group_measurements(
    results: dict[str, Any], group: Any, prefix: str, by_metric: dict[str, Measurement]
) -> list[Measurement]:
    """lm-eval's aggregate of a group, with the members' samples one after the other; ``member`` counts the members."""
    measurements = []
    members = [task.task_name for task in group.get_all_tasks()]
    for metric, filter_name, value, stderr in _numbers(results["results"][group.name]):
        shown = _metric_name(metric, filter_name)
        parts = [by_metric[f"{member}/{shown}"] for member in members if f"{member}/{shown}" in by_metric]
        samples = {
            name: np.concatenate([part.samples[name] for part in parts])
            for name in ("doc_id", "doc_hash", "value", "choices")
            if all(name in part.samples for part in parts)
        }
        counts = [part.n for part in parts]
        samples["member"] = np.repeat(np.arange(len(parts)), counts)
        better = parts[0].higher_is_better
        measurements.append(Measurement(prefix + shown, value, stderr, sum(counts), better, samples))
    return measurements


def _numbers(metrics: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """(metric, filter, value, standard error) of lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, …}``."""
    found = []
    for key, value in metrics.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        stderr = metrics.get(f"{metric}_stderr,{filter_name}")
        found.append((metric, filter_name, float(value), float(stderr) if isinstance(stderr, float | int) else None))
    return found


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _outcomes(samples: Samples) -> dict[str, Array]:
    """What is known of each document whatever the metric: its id and hash, and the likelihoods of its choices.

    ``loglikelihood`` [n, choices] is padded with NaN to the most choices a document has; ``choices`` counts them.
    """
    outcomes: dict[str, Array] = {
        "doc_id": np.array([sample["doc_id"] for sample in samples], dtype=np.int64),
        "doc_hash": np.array([list(bytes.fromhex(sample["doc_hash"])) for sample in samples], dtype=np.uint8),
    }
    answers = [[answer[0] if isinstance(answer, tuple) else answer for answer in s["filtered_resps"]] for s in samples]
    if all(isinstance(answer, float) for row in answers for answer in row):
        counts = np.array([len(row) for row in answers])
        table = np.full((len(samples), counts.max(initial=0)), np.nan)
        for row, answer in zip(table, answers, strict=True):
            row[: len(answer)] = answer
        outcomes |= {"loglikelihood": table, "choices": counts}
    return outcomes


def _values(samples: Samples, metric: str) -> dict[str, Array]:
    """``value`` [n], or [n, 2] for metrics that lm-eval aggregates from (log-likelihood, weight); none for others."""
    values = [sample.get(metric) for sample in samples]
    rows = [value if isinstance(value, tuple | list) else (value,) for value in values]
    numeric = all(isinstance(number, float | int | np.number) for row in rows for number in row)
    if not numeric or len({len(row) for row in rows}) != 1:
        return {}
    table = np.array(rows, dtype=np.float64)
    return {"value": table[:, 0] if table.shape[1] == 1 else table}


def _guessing(measurements: Sequence[Measurement]) -> dict[str, list[float]]:
    """What drawing a choice scores, and its standard error, by metric: where every answer is right or wrong."""
    found = {}
    for measurement in measurements:
        value, choices = (measurement.samples.get(name) for name in ("value", "choices"))
        if measurement.metric.rpartition("/")[2] not in _ACCURACIES or value is None or choices is None:
            continue
        if measurement.n and choices.min() > 1 and np.isin(value, (0, 1)).all():
            chance = 1 / choices
            found[measurement.metric] = [
                float(chance.mean()),
                math.sqrt(float((chance * (1 - chance)).sum())) / measurement.n,
            ]
    return found


def _manifest(results: dict[str, Any], loaded: dict[str, Any], lm: SharingLM, spec: TaskSpec) -> dict[str, Any]:
    bos, template = spec.options["bos"], lm.tokenizer.chat_template
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": spec.options["limit"],
        "tasks": {
            name: {
                "version": results["versions"][name],
                "fewshot": results["n-shot"][name],
                "documents": results["n-samples"][name]["effective"],
                "documents_available": results["n-samples"][name]["original"],
                "dataset": task.config.dataset_path,
                "subset": task.config.dataset_name,
                "split": task.config.test_split or task.config.validation_split,
                "documents_sha256": _sha256_of(results["samples"][name], "doc_hash"),
                "prompts_sha256": _sha256_of(results["samples"][name], "prompt_hash"),
            }
            for name, task in loaded["tasks"].items()
        },
        "groups": loaded.get("group_map", {}),
        "add_bos_token": "the tokenizer's default" if bos is None else bos,
        "begins_with_bos": lm.begins_with_bos,
        "special_tokens_added": len(lm.tok_encode("a")) - len(lm.tok_encode("a", add_special_tokens=False)),
        "tokenizer_sha256": tokenizer_sha256(lm.tokenizer),
        "prefix_token_id": lm.prefix_token_id,
        "chat_template": hashlib.sha256(str(template).encode()).hexdigest() if spec.options["chat"] else False,
        "max_length": lm.max_length,
        "tokens_at_once": lm.scorer.budget,
        "head": "computed where it is read" if lm.scorer.sliced else "within the full forward pass",
        "shared_beginnings": "computed once" if lm.scorer.shares else "computed for every request",
        "generation_batch_size": BATCH_SIZE,
        "softmax_dtype": "float32",
        "stderr": f"lm-eval's own; {BOOTSTRAP_ITERATIONS} bootstrap draws where it has no closed form",
    }


def _sha256_of(samples: Samples, name: str) -> str:
    return hashlib.sha256("".join(sample[name] for sample in samples).encode()).hexdigest()


def _refuse_not_finite(module: torch.nn.Module, likelihoods: Sequence[float], requests: Sequence[Instance]) -> None:
    """An argmax over NaN is its first index: such answers would score like guesses."""
    bad = [request for value, request in zip(likelihoods, requests, strict=True) if not math.isfinite(value)]
    if bad:
        raise BadOutput(
            f"task {bad[0].task_name}: {len(bad)} of {len(requests)} log-likelihoods are not finite, "
            f"first at document {bad[0].doc_id}",
            where=first_not_finite(module, _PROBE),
        )


def _refuse_logits_not_finite(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    if not torch.isfinite(output.logits[:, -1]).all():
        layer = first_not_finite(module, _PROBE)
        raise BadOutput("the model's probabilities are not finite while it generates", where=layer)
