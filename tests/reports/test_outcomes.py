from __future__ import annotations

import math

import numpy as np
import pytest

from harness.errors import HarnessError
from harness.reports.outcomes import Mismatch, check_paired, outcomes_of
from harness.reports.statistics import Interval, compare, estimate
from harness.tasks.measurement import Measurement

HASHES = np.arange(12 * 32, dtype=np.uint8).reshape(12, 32)
MANIFEST = {"tokenizer_sha256": "a", "tasks": {"piqa": {"version": 1.0, "prompts_sha256": "b", "documents": 12}}}


def measured(values, hashes=HASHES, **samples):
    samples = {"doc_id": np.arange(len(values)), "doc_hash": hashes[: len(values)], "value": values} | samples
    return Measurement("acc", float(np.mean(values)), None, len(values), True, samples)


def test_the_same_samples_pair():
    right = np.arange(12) % 2.0
    one, other = (outcomes_of(measured(values), MANIFEST) for values in (right, right[::-1]))
    check_paired(one, other)
    assert compare(one, other).n == 12


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (MANIFEST | {"tokenizer_sha256": "c"}, "tokenizer_sha256"),
        ({**MANIFEST, "tasks": {"piqa": {"version": 2.0, "prompts_sha256": "b"}}}, "version of piqa"),
        ({**MANIFEST, "tasks": {"piqa": {"version": 1.0, "prompts_sha256": "d"}}}, "prompts_sha256 of piqa"),
    ],
)
def test_another_tokenizer_version_or_prompt_refuses_to_pair(manifest, says):
    values = np.ones(12)
    with pytest.raises(Mismatch, match=says):
        compare(outcomes_of(measured(values), MANIFEST), outcomes_of(measured(values), manifest))


def test_other_documents_refuse_to_pair():
    one = outcomes_of(measured(np.ones(12)), MANIFEST)
    with pytest.raises(Mismatch, match="12 and 12 samples, of which 0 are the same"):
        compare(one, outcomes_of(measured(np.ones(12), HASHES[::-1].copy()), MANIFEST))
    with pytest.raises(Mismatch, match="12 and 10 samples, of which 10 are the same"):
        compare(one, outcomes_of(measured(np.ones(10)), MANIFEST))


def test_rows_of_one_document_are_one_block():
    values = np.array([1.0, 0, 1, 1, 0, 0])
    samples = {"doc_id": np.array([0, 0, 1, 1, 2, 2]), "doc_hash": np.repeat(HASHES[:3], 2, axis=0)}
    found = outcomes_of(measured(values, **samples), {})
    assert found.n == 3
    assert found.total.tolist() == [0.5, 1.0, 0.0]


def test_a_divergence_of_nothing_is_no_wrong_answer():
    """Full precision against itself: Wilson's interval of 0 right answers in 12 would reach 0.24."""
    nothing = Measurement("kl_divergence", 0.0, 0.0, 12, False, dict(measured(np.zeros(12)).samples))
    found = outcomes_of(nothing, MANIFEST)
    assert not found.right_or_wrong
    assert estimate(found).interval == Interval(0.0, 0.0)
    assert outcomes_of(measured(np.zeros(12)), MANIFEST).right_or_wrong


def test_a_value_that_the_samples_do_not_make_is_refused():
    skewed = Measurement("f1", 0.9, None, 12, True, dict(measured(np.ones(12) * 0.5).samples))
    with pytest.raises(HarnessError, match=r"samples make 0\.5"):
        outcomes_of(skewed, {})


def test_metrics_without_samples_are_refused():
    with pytest.raises(HarnessError, match="no outcomes"):
        outcomes_of(Measurement("mcc", 0.4, None, 2, True, {"doc_id": np.arange(2)}), {})


@pytest.mark.parametrize(
    ("metric", "samples", "value"),
    [
        ("token_perplexity", {"nll": np.array([4.0, 8.0]), "tokens": np.array([2, 2])}, math.exp(3)),
        ("word_perplexity", {"value": np.array([[-6.0, 1], [-2, 3]])}, math.exp(2)),
        ("bits_per_byte", {"value": np.array([[-6.0, 1], [-2, 3]])}, 2 / math.log(2)),
        ("perplexity", {"value": np.array([-1.0, -3.0])}, math.exp(2)),
        ("kl_divergence", {"kl_divergence": np.array([0.25, 0.5])}, 0.375),
    ],
)
def test_each_metric_is_the_ratio_that_defines_it(metric, samples, value):
    measurement = Measurement(metric, value, None, 2, False, {"window": np.arange(2)} | samples)
    assert outcomes_of(measurement, {}).value == pytest.approx(value)
