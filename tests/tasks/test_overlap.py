from __future__ import annotations

import numpy as np
import pytest

from harness.calibration import CalibrationSpec, calibration_ids
from harness.tasks.catalogue import parse_task
from harness.tasks.overlap import SHARED_TOKENS, overlap_problems, shared_run


@pytest.fixture
def stream():
    return np.random.default_rng(0).integers(0, 50_000, 20_000)


def test_a_shared_run_is_found_where_it_is(stream):
    windows = np.random.default_rng(1).integers(0, 50_000, (6, 200))
    windows[4, 33 : 33 + SHARED_TOKENS] = stream[1234 : 1234 + SHARED_TOKENS]
    assert shared_run(windows, stream) == (4, 33, 1234)


def test_one_token_less_is_no_overlap(stream):
    windows = np.random.default_rng(1).integers(0, 50_000, (6, 200))
    windows[4, 33 : 33 + SHARED_TOKENS - 1] = stream[1234 : 1234 + SHARED_TOKENS - 1]
    assert shared_run(windows, stream) is None


def test_the_same_tokens_in_another_order_are_no_overlap(stream):
    windows = stream[100 : 100 + SHARED_TOKENS][::-1][None].copy()
    assert shared_run(windows, stream) is None


def test_monotonous_text_is_compared_exactly():
    assert shared_run(np.zeros((1, 60), dtype=np.int64), np.zeros(60, dtype=np.int64)) == (0, 0, 0)
    assert shared_run(np.zeros((1, 60), dtype=np.int64), np.ones(60, dtype=np.int64)) is None
    assert shared_run(np.zeros((1, 10), dtype=np.int64), np.zeros(60, dtype=np.int64)) is None


def test_pydoc_calibration_does_not_overlap_its_evaluation_part(tiny_tokenizer):
    spec = CalibrationSpec.parse("pydoc:300x128")
    ids = calibration_ids(spec, tiny_tokenizer, None, seed=0)
    tasks = [parse_task(text) for text in ("pydoc", "pydoc_kl", "pydoc_cloze", "pydoc_words", "piqa", "wikitext")]
    assert overlap_problems(spec, ids, tasks, tiny_tokenizer, None) == []


def test_the_same_split_is_refused_for_every_task_that_reads_it(tiny_tokenizer):
    spec = CalibrationSpec.parse("pydoc@test:2x64")
    ids = calibration_ids(spec, tiny_tokenizer, None, seed=0)
    tasks = [parse_task(text) for text in ("pydoc", "pydoc_kl", "pydoc_cloze", "pydoc_words", "piqa")]
    problems = overlap_problems(spec, ids, tasks, tiny_tokenizer, None)
    assert [problem.what.split()[-4] for problem in problems] == ["pydoc", "pydoc_kl", "pydoc_cloze", "pydoc_words"]
    assert all("pydoc@test" in problem.where and problem.fix for problem in problems)


def test_shared_content_is_refused_whatever_the_split_is_called(tiny_tokenizer):
    spec = CalibrationSpec.parse("pydoc:4x128")
    ids = calibration_ids(CalibrationSpec.parse("pydoc@test:4x128"), tiny_tokenizer, None, seed=0)
    (problem,) = overlap_problems(spec, ids, [parse_task("pydoc")], tiny_tokenizer, None)
    assert "calibration window 0, token 0 = pydoc@test, token 0" in problem.where
    assert repr(tiny_tokenizer.decode(ids[0, :SHARED_TOKENS])) in problem.where


def test_lm_evals_wikitext_is_our_wikitext2(tiny_tokenizer, shared_data):
    spec = CalibrationSpec.parse("wikitext2@test:2x64")
    ids = calibration_ids(spec, tiny_tokenizer, shared_data, seed=0)
    tasks = [parse_task(text) for text in ("wikitext", "wikitext2", "wikitext2_kl", "pydoc")]
    assert len(overlap_problems(spec, ids, tasks, tiny_tokenizer, shared_data)) == 3
    clean = CalibrationSpec.parse("wikitext2:2x64")
    ids = calibration_ids(clean, tiny_tokenizer, shared_data, seed=0)
    assert overlap_problems(clean, ids, tasks[:1], tiny_tokenizer, shared_data) == []
