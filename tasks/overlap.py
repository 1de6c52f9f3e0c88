"""Refuse a calibration set that shares text with an evaluation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from harness.calibration import CalibrationSpec
from harness.corpora import CORPORA, corpus_problem, evaluation_text
from harness.errors import HarnessError
from harness.tasks.catalogue import TaskSpec

SHARED_TOKENS = 50  # as many in a row are not shared by chance
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Ids = npt.NDArray[np.int64]

_LM_EVAL_CORPORA = {"wikitext": "wikitext2", "pydoc_words": "pydoc", "pydoc_cloze": "pydoc"}
"""lm-eval tasks whose documents are the evaluation split of one of our corpora."""


def overlap_problems(
    calibration: CalibrationSpec,
    ids: Ids,
    specs: Sequence[TaskSpec],
    tokenizer: PreTrainedTokenizerBase,
    data_root: Path | None,
) -> list[HarnessError]:
    """One error for each task whose evaluation split overlaps the calibration ids [sequences, length].

    Overlap is the same split, or ``SHARED_TOKENS`` consecutive tokens of a calibration window found in the text.
    """
    problems = []
    streams: dict[str, Ids] = {}
    for spec in specs:
        corpus = _corpus_of(spec)
        if corpus is None:
            continue
        split = CORPORA[corpus].evaluation_split
        if (calibration.corpus, calibration.split) == (corpus, split):
            problems.append(_error(calibration, spec, f"both read {corpus}@{split}"))
            continue
        if spec.kind == "lm_eval" and not _at_hand(corpus, split, data_root):
            continue  # the task has its own copy of the text; ours is not here to compare with
        if corpus not in streams:
            streams[corpus] = _tokens(evaluation_text(corpus, data_root), tokenizer)
        hit = shared_run(ids, streams[corpus])
        if hit is not None:
            window, at, found = hit
            text = tokenizer.decode(ids[window, at : at + SHARED_TOKENS])
            where = f"calibration window {window}, token {at} = {corpus}@{split}, token {found}: {text!r}"
            problems.append(_error(calibration, spec, where))
    return problems


def shared_run(windows: Ids, stream: Ids, run: int = SHARED_TOKENS) -> tuple[int, int, int] | None:
    """The first ``run`` consecutive tokens of a window [windows, length] that also stand in ``stream``.

    Returns (window, position in it, position in the stream), or None. Hashes find candidates; equality decides.
    """
    if windows.shape[1] < run or len(stream) < run:
        return None
    of_stream = _rolling_hash(stream[None], run)[0]
    of_windows = _rolling_hash(windows, run)
    for window, at in np.argwhere(np.isin(of_windows, of_stream)):
        candidate = windows[window, at : at + run]
        for found in np.flatnonzero(of_stream == of_windows[window, at]):
            if np.array_equal(candidate, stream[found : found + run]):
                return int(window), int(at), int(found)
    return None


def _rolling_hash(rows: Ids, run: int) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every ``run`` consecutive tokens of each row [rows, length - run + 1]."""
    tokens = (rows.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    tokens ^= tokens >> np.uint64(29)
    starts = rows.shape[1] - run + 1
    hashes = np.zeros((rows.shape[0], starts), dtype=np.uint64)
    for offset in range(run):  # Horner's rule modulo 2^64, for all positions at once
        hashes = hashes * _MULTIPLIER + tokens[:, offset : offset + starts]
    return hashes


def _corpus_of(spec: TaskSpec) -> str | None:
    return _LM_EVAL_CORPORA.get(spec.name) if spec.kind == "lm_eval" else spec.corpus


def _at_hand(corpus: str, split: str, data_root: Path | None) -> bool:
    needs_data = CORPORA[corpus].repository is not None
    return not (needs_data and data_root is None) and corpus_problem(corpus, split, data_root) is None


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def _error(calibration: CalibrationSpec, spec: TaskSpec, where: str) -> HarnessError:
    return HarnessError(
        f"calibration {calibration} overlaps the text that task {spec.key} is scored on",
        where=where,
        fix="calibrate on another corpus or split, or leave the task out",
    )
