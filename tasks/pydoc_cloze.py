"""``pydoc_cloze``: which of four sentences comes next, from the test part of Python's own documentation.

An lm-eval multiple-choice task for machines with no data. The context is a paragraph up to a sentence, the true
choice the sentence after it, and the three others are sentences of about its length from other topics.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import datasets

from harness.corpora import pydoc_topics

CHOICES = 4
_LENGTHS = range(30, 241)  # characters of a sentence that can be a choice
_NEAREST = 24  # sentences nearest in length, of which three are drawn


@dataclass(frozen=True)
class Pair:
    """A sentence and what stands before it in its paragraph."""

    topic: str
    context: str
    sentence: str


def config() -> dict[str, Any]:
    """The task in lm-eval's terms."""
    return {
        "task": "pydoc_cloze",
        "custom_dataset": _dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }


def cloze_documents() -> list[dict[str, Any]]:
    """``topic, context, choices, answer`` (the index of the true choice), in the order of the text."""
    pairs = [pair for topic, text in pydoc_topics("test").items() for pair in _pairs(topic, text)]
    return [_document(pair, pairs) for pair in pairs]


def _dataset(**_: Any) -> datasets.DatasetDict:
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(cloze_documents())})


def _pairs(topic: str, text: str) -> list[Pair]:
    pairs = []
    for paragraph in text.split("\n\n"):
        prose = " ".join(paragraph.split())
        if not re.fullmatch(r"[A-Z].*\.", prose):  # headings, grammar, code, lists
            continue
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", prose)
        pairs += [
            Pair(topic, " ".join(sentences[:at]), sentence)
            for at, sentence in enumerate(sentences)
            if at > 0 and len(sentence) in _LENGTHS
        ]
    return pairs


def _document(pair: Pair, pairs: list[Pair]) -> dict[str, Any]:
    """Draws by hashes of the texts, so that a document stays the same while its sentences do."""
    others = sorted({other.sentence for other in pairs if other.topic != pair.topic} - {pair.sentence})
    nearest = sorted(others, key=lambda sentence: abs(len(sentence) - len(pair.sentence)))[:_NEAREST]
    drawn = sorted(nearest, key=lambda sentence: _draw(pair.sentence + sentence))[: CHOICES - 1]
    answer = _draw(pair.context + pair.sentence) % CHOICES
    choices = [*drawn[:answer], pair.sentence, *drawn[answer:]]
    return {"topic": pair.topic, "context": pair.context, "choices": choices, "answer": answer}


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
