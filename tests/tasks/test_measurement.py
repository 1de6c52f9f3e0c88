from __future__ import annotations

import json
import math

import numpy as np
import pytest

from harness.errors import BadOutput, HarnessError
from harness.tasks.measurement import Measurement, TaskResult, read_result, write_result
from harness.tasks.result_files import read_summary, samples_path, slug, summary_path


@pytest.fixture
def result():
    ids = {"doc_id": np.arange(3)}
    return TaskResult(
        task="piqa:limit=3",
        measurements=(
            Measurement("acc", 2 / 3, 0.3, 3, True, ids | {"value": np.array([1.0, 0.0, 1.0])}),
            Measurement("acc_norm", 1.0, None, 3, True, ids | {"value": np.ones(3)}),
        ),
        seconds=1.5,
        manifest={"version": 1.0},
    )


def test_a_result_reads_back(tmp_path, result):
    assert read_result(tmp_path, result.task) is None
    write_result(tmp_path, result)
    again = read_result(tmp_path, result.task)
    assert (again.task, again.seconds, again.manifest) == (result.task, 1.5, {"version": 1.0})
    for ours, theirs in zip(again.measurements, result.measurements, strict=True):
        assert (ours.metric, ours.value, ours.stderr, ours.n) == (theirs.metric, theirs.value, theirs.stderr, theirs.n)
        assert all(np.array_equal(ours.samples[name], theirs.samples[name]) for name in theirs.samples)


def test_the_summary_is_written_last(tmp_path, result, monkeypatch):
    monkeypatch.setattr("harness.atomic.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_result(tmp_path, result)
    assert samples_path(tmp_path, result.task).exists()
    assert read_result(tmp_path, result.task) is None


def test_shared_samples_are_written_once(tmp_path, result):
    write_result(tmp_path, result)
    first, second = read_summary(tmp_path, result.task)["measurements"]
    assert first["samples"]["doc_id"] == second["samples"]["doc_id"]
    assert first["samples"]["value"] != second["samples"]["value"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_no_measurement(number):
    with pytest.raises(BadOutput, match="acc"):
        Measurement("acc", number, None, 0, True)
    with pytest.raises(BadOutput, match="standard error"):
        Measurement("acc", 0.5, number, 0, True)


def test_samples_must_have_n_rows():
    with pytest.raises(ValueError, match="2 rows"):
        Measurement("acc", 0.5, None, 3, True, {"value": np.zeros(2)})


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "another"}'])
def test_a_foreign_file_is_refused(tmp_path, text):
    summary_path(tmp_path, "piqa").write_text(text)
    with pytest.raises(HarnessError, match="not the result of task piqa"):
        read_summary(tmp_path, "piqa")


def test_slugs_are_file_names_and_differ():
    keys = ["piqa", "piqa:limit=1", "piqa-limit=1", "../../x", "PIQA", "x" * 300, "x" * 301]
    slugs = [slug(key) for key in keys]
    assert len(set(slugs)) == len(keys)
    assert slugs[0] == "piqa"
    assert all("/" not in name and len(name) < 100 for name in slugs)


def test_summaries_hold_no_nan(tmp_path, result):
    write_result(tmp_path, result)
    json.loads(summary_path(tmp_path, result.task).read_text(), parse_constant=pytest.fail)
