from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from harness.errors import HarnessError
from harness.reports.outcomes import Mismatch, Outcomes
from harness.reports.statistics import compare, estimate, holm, over_seeds, verdicts

TRIALS = 1000


def outcomes(total, weight=None, *, exponential=False, higher_is_better=True, metric="acc", facts=None):
    total = np.asarray(total, dtype=np.float64)
    weight = np.ones_like(total) if weight is None else np.broadcast_to(np.float64(weight), total.shape)
    keys = tuple(map(str, range(len(total))))
    return Outcomes(metric, total, weight, exponential, higher_is_better, keys, facts or {})


def perplexity(nll, tokens=2047):
    return outcomes(
        np.asarray(nll) * tokens, tokens, exponential=True, higher_is_better=False, metric="token_perplexity"
    )


def answers(rng, documents, changed, gained=0.5):
    """Right and wrong answers of two cells, of which a share differ, ``gained`` of these to the candidate's favour."""
    base = rng.random(documents) < 0.6
    differ = rng.random(documents) < changed
    wins = rng.random(documents) < gained
    return outcomes(np.where(differ, ~wins, base)), outcomes(np.where(differ, wins, base))


def windows(rng, count, effect=0.0):
    """Losses of two cells by window: windows differ far more than the cells do, and the tails are not normal."""
    difficulty = rng.gamma(20, 0.15, count)
    noise = 0.01 * rng.standard_exponential((2, count))
    return perplexity(difficulty * (1 + noise[0])), perplexity(difficulty * (1 + noise[1]) + effect)


# --- checked by simulation -------------------------------------------------------------------------------------------


def a_a_answers(rng):
    return answers(rng, 1000, 0.3)


def a_a_windows(rng):
    return windows(rng, 40)


@pytest.mark.parametrize("draw", [a_a_answers, a_a_windows])
def test_equal_cells_differ_one_time_in_twenty_and_the_interval_holds_the_truth_the_others(draw):
    rng = np.random.default_rng(1)
    comparisons = [compare(*draw(rng)) for _ in range(TRIALS)]
    alarms = sum(comparison.verdict() in ("better", "worse") for comparison in comparisons)
    covered = sum(comparison.interval.low <= 0 <= comparison.interval.high for comparison in comparisons)
    assert 0.035 <= alarms / TRIALS <= 0.065
    assert 0.93 <= covered / TRIALS <= 0.97


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng: outcomes(rng.random(200) < 0.7), 0.7),
        (lambda rng: perplexity(rng.normal(3, 0.4, 16)), math.exp(3)),
        (lambda rng: outcomes(rng.gamma(4, 0.1, 60), metric="kl_divergence"), 0.4),
    ],
)
def test_intervals_of_values_hold_the_truth_nineteen_times_in_twenty(draw, truth):
    rng = np.random.default_rng(3)
    intervals = [estimate(draw(rng)).interval for _ in range(TRIALS)]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    assert 0.93 <= covered / TRIALS <= 0.97


def test_pairing_sees_what_the_unpaired_test_misses():
    rng = np.random.default_rng(4)
    paired = unpaired = 0
    for _ in range(100):
        base, candidate = windows(rng, 40, effect=0.02)
        paired += compare(base, candidate).verdict() == "worse"
        unpaired += ttest_ind(base.total, candidate.total).pvalue < 0.05
    assert paired > 80
    assert unpaired < 20


def test_a_table_without_differences_has_a_false_one_in_at_most_one_of_twenty():
    rng = np.random.default_rng(5)
    tables = [[compare(*a_a_windows(rng)) for _ in range(10)] for _ in range(100)]
    false = sum(any(v != "undecided" for v in verdicts(table)) for table in tables)
    uncorrected = sum(any(one.verdict() != "undecided" for one in table) for table in tables)
    assert false <= 10 < uncorrected


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effect", "margin", "verdict"), [(0.05, 0.01, "worse"), (-0.05, 0.01, "better"), (0.0, 0.05, "same")]
)
def test_the_verdict_is_against_the_margin(effect, margin, verdict):
    comparison = compare(*windows(np.random.default_rng(6), 40, effect), margin=margin)
    assert comparison.verdict() == verdict
    assert comparison.relative
    assert comparison.difference == pytest.approx(comparison.candidate / comparison.baseline - 1)
    assert comparison.interval.low < comparison.difference < comparison.interval.high


def test_what_lies_at_the_margin_is_undecided():
    assert compare(*windows(np.random.default_rng(7), 40, effect=0.01), margin=0.01).verdict() == "undecided"


def test_no_changed_answer_is_no_proof_that_none_ever_changes():
    few, many = outcomes(np.ones(50)), outcomes(np.ones(5000))
    assert compare(few, few, margin=0.01).verdict() == "undecided"
    assert compare(many, many, margin=0.01).verdict() == "same"


def test_equal_numbers_are_the_same_without_any_margin():
    base = perplexity(np.linspace(2, 4, 16))
    assert compare(base, base).verdict() == "same"


def test_the_exact_test_is_mcnemars():
    base, candidate = np.zeros(20), np.zeros(20)
    base[:1], candidate[1:9] = 1, 1  # 8 gained, 1 lost
    assert compare(outcomes(base), outcomes(candidate)).p_value == pytest.approx(2 * (1 + 9) / 2**9)


def test_four_windows_say_nothing():
    comparison = compare(perplexity([2, 3, 4, 5]), perplexity([4, 5, 6, 7.5]))
    assert comparison.interval is None
    assert comparison.verdict() == "undecided"
    assert estimate(perplexity([2, 3, 4, 5])).interval is None


def test_one_window_of_many_says_nothing():
    base = np.linspace(2, 4, 16)
    comparison = compare(perplexity(base), perplexity(base + np.eye(16)[3]))
    assert (comparison.interval, comparison.verdict()) == (None, "undecided")


@pytest.mark.parametrize("margin", [-0.1, 1.0, math.nan])
def test_a_margin_that_is_none_is_refused(margin):
    base = perplexity(np.linspace(2, 4, 16))
    with pytest.raises(HarnessError, match="no margin"):
        compare(base, base, margin=margin)


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_more_seeds_shrink_the_variance_between_them_only():
    rng = np.random.default_rng(8)
    difficulty = rng.gamma(20, 0.15, 30)

    def seeds(count):
        return [perplexity(difficulty + shift + rng.normal(0, 0.01, 30)) for shift in rng.normal(0, 0.1, count)]

    few, many = over_seeds(seeds(4)), over_seeds(seeds(400))
    assert many.between_variance == pytest.approx(0.1**2 / 400, rel=0.25)
    assert few.between_variance > 10 * many.between_variance
    assert many.within_variance == pytest.approx(difficulty.var(ddof=1) / 30, rel=0.05)
    assert many.interval.low < many.value < many.interval.high


def test_the_interval_over_seeds_holds_the_truth():
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(TRIALS):
        shared = rng.normal(3, 0.3, 20)
        found = over_seeds([perplexity(shared + rng.normal(0, 0.1)) for _ in range(4)])
        covered += found.interval.low <= math.exp(3) <= found.interval.high
    assert 0.93 <= covered / TRIALS <= 0.98


def test_other_numbers_of_tokens_refuse_to_pair():
    with pytest.raises(Mismatch, match="numbers of tokens"):
        compare(perplexity(np.ones(8)), perplexity(np.ones(8), tokens=1023))
