from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest

from harness import calibration
from harness.calibration import CalibrationSpec, calibration_ids, calibration_sha256
from harness.corpora import documents
from harness.errors import HarnessError


@pytest.mark.parametrize("text", ["c4:32x512", "wikitext2:128x2048", "pydoc:1x2", "wikitext2@test:8x256"])
def test_specs_read_back_as_written(text):
    assert str(CalibrationSpec.parse(text)) == text


def test_the_train_split_is_the_default():
    assert CalibrationSpec.parse("c4@train:2x8") == CalibrationSpec("c4", "train", 2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c4", "not understood"),
        ("c4:32", "not understood"),
        ("c4:32x512x2", "not understood"),
        ("c5:32x512", "unknown corpus"),
        ("c4@test:32x512", "no split"),
        ("c4:0x512", "no tokens"),
        ("c4:4x1", "no tokens"),
    ],
)
def test_nonsense_is_refused_with_a_fix(text, message):
    with pytest.raises(HarnessError, match=message) as caught:
        CalibrationSpec.parse(text)
    assert caught.value.fix


def test_seed_0_takes_the_first_windows_of_the_documents_with_eos_between(tiny_tokenizer):
    spec = CalibrationSpec.parse("pydoc:7x64")
    stream: list[int] = []
    for text in documents("pydoc", "train", None):
        stream += tiny_tokenizer(text, add_special_tokens=False)["input_ids"] + [tiny_tokenizer.eos_token_id]
    ids = calibration_ids(spec, tiny_tokenizer, None, seed=0)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, np.array(stream[: 7 * 64]).reshape(7, 64))


def test_another_seed_draws_windows_of_the_same_stream_without_replacement(tiny_tokenizer):
    spec = CalibrationSpec.parse("pydoc:40x64")
    first = calibration_ids(spec, tiny_tokenizer, None, seed=0)
    drawn = calibration_ids(spec, tiny_tokenizer, None, seed=3)
    np.testing.assert_array_equal(drawn, calibration_ids(spec, tiny_tokenizer, None, seed=3))
    assert not np.array_equal(drawn, calibration_ids(spec, tiny_tokenizer, None, seed=4))
    assert not np.array_equal(drawn, first)
    count = windows_there_are(tiny_tokenizer, 64)
    every = calibration_ids(CalibrationSpec.parse(f"pydoc:{count}x64"), tiny_tokenizer, None, seed=0)
    assert len({row.tobytes() for row in drawn}) == 40
    assert {row.tobytes() for row in drawn} <= {row.tobytes() for row in every}


def windows_there_are(tokenizer, length):
    with pytest.raises(HarnessError, match=rf"holds \d+ windows of {length}") as caught:
        calibration_ids(CalibrationSpec.parse(f"pydoc:99999x{length}"), tokenizer, None, seed=0)
    return int(caught.value.what.split("holds ")[1].split()[0])


def test_too_few_windows_says_how_many_there_are(tiny_tokenizer):
    count = windows_there_are(tiny_tokenizer, 512)
    assert len(calibration_ids(CalibrationSpec.parse(f"pydoc:{count}x512"), tiny_tokenizer, None, seed=0)) == count
    with pytest.raises(HarnessError, match=f"{count} windows"):
        calibration_ids(CalibrationSpec.parse(f"pydoc:{count + 1}x512"), tiny_tokenizer, None, seed=0)


def test_the_hash_covers_ids_and_shape():
    ids = np.arange(12, dtype=np.int64)
    digests = {calibration_sha256(ids.reshape(shape)) for shape in ((3, 4), (4, 3), (2, 6))}
    assert len(digests) == 3
    changed = ids.reshape(3, 4).copy()
    changed[2, 3] += 1
    assert calibration_sha256(changed) not in digests
    assert calibration_sha256(ids.reshape(3, 4).astype(">i8")) in digests


def test_a_tokenizer_without_eos_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(HarnessError, match="end-of-sequence"):
        calibration_ids(CalibrationSpec.parse("pydoc:1x8"), tokenizer, None, seed=0)


def test_reading_specs_imports_nothing_heavy():
    light = f"{calibration.__name__}, harness.tasks.catalogue, harness.tasks.result_files"
    heavy = "{'torch', 'numpy', 'transformers', 'datasets', 'pyarrow', 'lm_eval'}"
    code = f"import sys, {light}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
