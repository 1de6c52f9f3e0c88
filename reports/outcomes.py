"""What each document or window adds to a metric: the one form in which statistics see any measurement.

Every metric is a ratio of two sums over blocks (a mean is the case of weights 1), perplexities the exponential of one.
The block, a document or a window, is what was drawn; rows of one document are one draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError
from harness.tasks.measurement import Measurement

Vector = npt.NDArray[np.float64]

_FACTS = (
    "length", "text_sha256", "special_tokens_added", "tokenizer_sha256", "add_bos_token", "chat_template", "max_length",
)  # fmt: skip
_FACTS_OF_A_TASK = ("version", "fewshot", "dataset", "subset", "split", "prompts_sha256")
_HASHES = ("doc_hash", "window_hash")


class Mismatch(HarnessError):
    """Two measurements are not of the same samples."""


@dataclass(frozen=True)
class Outcomes:
    """What each block adds to a metric: the value is ``sum(total) / sum(weight)``, or its exponential.

    ``total``, ``weight``, ``keys`` have one entry a block. ``keys`` names the blocks by their content, ``facts`` says
    how they were turned into tokens; both must agree before two cells are compared.
    """

    metric: str
    total: Vector
    weight: Vector
    exponential: bool
    higher_is_better: bool
    keys: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def n(self) -> int:
        return len(self.total)

    @property
    def value(self) -> float:
        return self.shown(float(self.total.sum() / self.weight.sum()))

    @property
    def right_or_wrong(self) -> bool:
        """Whether every block is one answer that counts 1 or 0; a divergence that is 0 everywhere is no answer."""
        counts = self.higher_is_better and not self.exponential
        return counts and bool(np.isin(self.total, (0, 1)).all() and (self.weight == 1).all())

    def shown(self, ratio: float) -> float:
        """A ratio of the sums in the metric's own units."""
        return math.exp(ratio) if self.exponential else ratio


def outcomes_of(measurement: Measurement, manifest: Mapping[str, Any]) -> Outcomes:
    """The blocks behind a measurement; ``manifest`` is that of its task's result.

    Raises HarnessError when no per-sample outcomes are kept, or when they do not add up to the measured value.
    """
    samples = measurement.samples
    sums = _sums(measurement.metric.rpartition("/")[2], samples)
    if sums is None:
        raise HarnessError(
            f"{measurement.metric}: no outcomes of the single samples are kept for this metric",
            fix="compare another metric of the task",
        )
    (total, weight), exponential = sums
    keys, total, weight = _by_block(samples, total, weight)
    outcomes = Outcomes(
        measurement.metric, total, weight, exponential, measurement.higher_is_better, keys, _facts(manifest)
    )
    if not math.isclose(outcomes.value, measurement.value, rel_tol=1e-6, abs_tol=1e-9):
        raise HarnessError(
            f"{measurement.metric}: the samples make {outcomes.value:.6g}, not the measured {measurement.value:.6g}",
            fix="compare a metric that is a mean over the samples",
        )
    return outcomes


def _sums(metric: str, samples: Mapping[str, npt.NDArray[Any]]) -> tuple[tuple[Vector, Vector], bool] | None:
    """((total, weight), exponential) by the metric's definition, one row a sample; None if the samples lack them."""
    if metric == "token_perplexity" and "nll" in samples:
        return (_floats(samples["nll"]), _floats(samples["tokens"])), True
    values = samples.get(metric, samples.get("value"))
    if values is None:
        return None
    if values.ndim == 2:  # lm-eval's (log-likelihood, words or bytes)
        total = -_floats(values[:, 0])
        return (total / math.log(2) if metric == "bits_per_byte" else total, _floats(values[:, 1])), (
            metric != "bits_per_byte"
        )
    values = _floats(values)
    if metric == "perplexity":
        return (-values, np.ones_like(values)), True
    return (values, np.ones_like(values)), False


def _floats(array: npt.NDArray[Any]) -> Vector:
    values: Vector = array.astype(np.float64)
    return values


def _by_block(
    samples: Mapping[str, npt.NDArray[Any]], total: Vector, weight: Vector
) -> tuple[tuple[str, ...], Vector, Vector]:
    """Sums over the rows of one document or window, in the order in which the blocks come first."""
    hashes = next((samples[name] for name in _HASHES if name in samples), None)
    numbers = [samples[name] for name in ("member", "doc_id", "window") if name in samples]
    columns = [list(map(str, column.tolist())) for column in numbers]
    columns += [] if hashes is None else [[bytes(row).hex() for row in hashes]]
    keys = list(map(":".join, zip(*columns, strict=True)))
    blocks = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    at = np.array([blocks[key] for key in keys], dtype=np.int64)
    if len(blocks) == len(keys):
        return tuple(blocks), total, weight
    # Several rows of one document are one draw: their mean counts as the document's outcome.
    rows_of = np.bincount(at)
    return tuple(blocks), np.bincount(at, total) / rows_of, np.bincount(at, weight) / rows_of


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for two measurements to be of the same samples."""
    facts = {name: manifest[name] for name in _FACTS if name in manifest}
    for task, about in manifest.get("tasks", {}).items():
        facts |= {f"{name} of {task}": about[name] for name in _FACTS_OF_A_TASK if name in about}
    return facts


def check_paired(baseline: Outcomes, candidate: Outcomes) -> None:
    """Raises Mismatch, saying what differs, unless both are of the same samples of the same task."""
    if baseline.metric != candidate.metric:
        raise Mismatch(f"{baseline.metric} and {candidate.metric} cannot be compared", fix="name one metric")
    for name in sorted(baseline.facts.keys() | candidate.facts.keys()):
        one, other = baseline.facts.get(name), candidate.facts.get(name)
        if one != other:
            raise Mismatch(
                f"{baseline.metric}: {name} is {one!r} in the one and {other!r} in the other",
                fix="evaluate both with the same tokenizer and the same version of the task",
            )
    if baseline.keys != candidate.keys:
        common = len(set(baseline.keys) & set(candidate.keys))
        raise Mismatch(
            f"{baseline.metric}: {baseline.n} and {candidate.n} samples, of which {common} are the same",
            fix="evaluate both on the same samples: the same data, limit and windows",
        )
    if not np.array_equal(baseline.weight, candidate.weight):
        raise Mismatch(
            f"{baseline.metric}: the samples have other numbers of tokens or words",
            fix="evaluate both with the same tokenizer and the same version of the task",
        )
