from __future__ import annotations

import math

import numpy as np
import pytest
from planted import cell, write_run

from harness import results
from harness.flags import no_better_than_guessing
from harness.tasks.measurement import Measurement, TaskResult


@pytest.mark.fault(20)
@pytest.mark.parametrize(("value", "flagged"), [(511.0, False), (513.0, True)])
def test_a_perplexity_above_the_vocabulary_is_flagged(value, flagged, tmp_path):
    measurement = Measurement("token_perplexity", value, 1.0, 12, False)
    result = TaskResult("pydoc", (measurement,), 1.0, {"vocabulary": 512})
    run = write_run(tmp_path, [(cell("W2A16", ["pydoc"]), [result])])
    lines = no_better_than_guessing(results.load(run), run)
    assert len(lines) == flagged
    assert all("tiny W2A16 rtn: pydoc token_perplexity 513.00 is above the 512 tokens" in line for line in lines)


def answered(skill, documents, dice):
    """What a multiple-choice task of four choices leaves, of a model that is right with probability ``skill``."""
    right = dice.random(documents) < skill
    guessing = {"acc": [0.25, math.sqrt(0.25 * 0.75 / documents)]}
    return TaskResult(
        "quiz", (Measurement("acc", float(right.mean()), 0.01, documents, True),), 1.0, {"guessing": guessing}
    )


@pytest.mark.fault(20)
def test_accuracies_that_a_guesser_reaches_are_flagged_and_others_are_not(tmp_path):
    dice = np.random.default_rng(0)
    told = {}
    for skill in (0.25, 0.4):
        quizzed = [
            (cell(f"W{bits}A{other}", ["quiz"]), [answered(skill, 400, dice)])
            for bits in range(2, 7)
            for other in range(2, 22)
        ]
        run = write_run(tmp_path / str(skill), quizzed)
        told[skill] = len(no_better_than_guessing(results.load(run), run))
    assert told[0.4] == 0
    assert told[0.25] >= 93  # two standard errors above hold 97.7 % of guessers


def test_of_a_group_only_the_whole_is_told(tmp_path):
    guessing = {"acc": [0.25, 0.01], "one/acc": [0.25, 0.02], "other/acc": [0.25, 0.02]}
    rows = tuple(Measurement(metric, 0.25, 0.01, 100, True) for metric in guessing)
    for manifest, lines in (({"guessing": guessing}, 1), ({"guessing": {"one/acc": [0.25, 0.02]}}, 1), ({}, 0)):
        run = write_run(
            tmp_path / str(len(list(tmp_path.iterdir()))),
            [(cell("W2A16", ["g"]), [TaskResult("g", rows, 1.0, manifest)])],
        )
        assert len(no_better_than_guessing(results.load(run), run)) == lines
