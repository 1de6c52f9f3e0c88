"""``pydoc_words``: word perplexity as lm-eval defines it, over the test part of Python's own documentation.

Each topic is a document; lm-eval's rolling log-likelihood scores it whole, and the sum is taken over its words, split
at white space, or its bytes.
"""

from __future__ import annotations

from typing import Any

import datasets

from harness.corpora import pydoc_topics


def config() -> dict[str, Any]:
    """The task in lm-eval's terms: those of its ``wikitext``."""
    return {
        "task": "pydoc_words",
        "custom_dataset": _dataset,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
        "metadata": {"version": 1.0},
    }


def _dataset(**_: Any) -> datasets.DatasetDict:
    topics = [{"topic": topic, "text": text} for topic, text in pydoc_topics("test").items()]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(topics)})
