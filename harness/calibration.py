"""The calibration set: the same token ids for every method of a run.

Rule: the documents of the split in order, tokenized without special tokens, the end-of-sequence token between them,
concatenated, cut into windows of the length, the tail dropped. Seed 0 takes the first windows; any other seed draws
them without replacement (``numpy.random.default_rng(seed).choice``) and keeps the order drawn.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.corpora import corpus_named, corpus_problem, documents
from harness.errors import HarnessError

if TYPE_CHECKING:  # the plan reads calibration specs, and starts without numpy
    from numpy import int64
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_GRAMMAR = re.compile(r"(?P<corpus>[^:@]+)(?:@(?P<split>[^:]+))?:(?P<sequences>\d+)x(?P<length>\d+)")
_DOCUMENTS_AT_ONCE = 64
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class CalibrationSpec:
    """Which windows calibrate: ``c4:32x512`` is 32 windows of 512 tokens of C4's train split."""

    corpus: str
    split: str
    sequences: int
    length: int

    @classmethod
    def parse(cls, text: str) -> CalibrationSpec:
        """Read ``c4:32x512`` or ``wikitext2@test:8x256``. Raises HarnessError for another form, corpus or split."""
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            raise HarnessError(
                f"calibration {text!r} is not understood",
                fix="write <corpus>[@<split>]:<windows>x<length>, for example c4:32x512",
            )
        spec = cls(match["corpus"], match["split"] or DEFAULT_SPLIT, int(match["sequences"]), int(match["length"]))
        corpus = corpus_named(spec.corpus)
        if spec.split not in corpus.splits:
            raise HarnessError(
                f"calibration {text!r}: {spec.corpus} has no split {spec.split!r}",
                fix=f"choose from {', '.join(corpus.splits)}",
            )
        if spec.sequences < 1 or spec.length < 2:
            raise HarnessError(f"calibration {text!r} holds no tokens to predict", fix="ask for 1x2 or more")
        return spec

    def __str__(self) -> str:
        split = "" if self.split == DEFAULT_SPLIT else f"@{self.split}"
        return f"{self.corpus}{split}:{self.sequences}x{self.length}"


def calibration_problem(spec: CalibrationSpec, data_root: Path | None) -> HarnessError | None:
    """What keeps the text from being read, by looking at paths only."""
    return corpus_problem(spec.corpus, spec.split, data_root)


def calibration_ids(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, data_root: Path | None, seed: int
) -> NDArray[int64]:
    """Token ids [sequences, length] by the rule above.

    Raises HarnessError when the split is missing, holds too few windows, or the tokenizer has no end-of-sequence token.
    """
    import numpy as np

    texts = documents(spec.corpus, spec.split, data_root)
    enough = spec.sequences * spec.length if seed == 0 else None
    stream = _token_stream(texts, tokenizer, enough)
    windows = stream[: len(stream) // spec.length * spec.length].reshape(-1, spec.length)
    if len(windows) < spec.sequences:
        raise HarnessError(
            f"calibration {spec}: {spec.corpus}@{spec.split} holds {len(windows)} windows of {spec.length} tokens",
            fix=f"ask for at most {spec.corpus}:{len(windows)}x{spec.length}, shorter windows, or another corpus",
        )
    if seed == 0:
        return windows[: spec.sequences]
    return windows[np.random.default_rng(seed).choice(len(windows), spec.sequences, replace=False)]


def calibration_sha256(ids: NDArray[int64]) -> str:
    """Of the shape and the ids as little-endian 64-bit integers."""
    digest = hashlib.sha256("x".join(map(str, ids.shape)).encode() + b":")
    digest.update(ids.astype("<i8").tobytes())
    return digest.hexdigest()


def _token_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase, enough: int | None) -> NDArray[int64]:
    """The documents' tokens, EOS between them; stops after ``enough`` tokens (None: after the last document)."""
    import numpy as np

    if tokenizer.eos_token_id is None:
        raise HarnessError(
            "the tokenizer has no end-of-sequence token, which separates calibration documents",
            fix="set eos_token in the model's tokenizer_config.json",
        )
    ids: list[int] = []
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        batch = texts[start : start + _DOCUMENTS_AT_ONCE]
        for document in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            if ids:
                ids.append(int(tokenizer.eos_token_id))
            ids += document
        if enough is not None and len(ids) >= enough:
            break
    return np.asarray(ids, dtype=np.int64)
