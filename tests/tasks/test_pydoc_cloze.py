from __future__ import annotations

from collections import Counter

from harness.corpora import pydoc_topics
from harness.tasks.pydoc_cloze import CHOICES, cloze_documents


def test_each_document_has_one_true_choice_from_its_topic_and_three_from_others():
    text = {topic: " ".join(text.split()) for topic, text in pydoc_topics("test").items()}
    documents = cloze_documents()
    assert len(documents) > 300
    for document in documents:
        true = document["choices"][document["answer"]]
        assert len(set(document["choices"])) == CHOICES
        assert f"{document['context']} {true}" in text[document["topic"]]
        others = set(document["choices"]) - {true}
        elsewhere = [topic for topic in text if topic != document["topic"]]
        assert all(any(other in text[topic] for topic in elsewhere) for other in others)


def test_neither_length_nor_position_tells_the_answer():
    documents = cloze_documents()
    answers = Counter(document["answer"] for document in documents)
    assert max(answers.values()) < 0.32 * len(documents)
    ranks = Counter(
        sorted(map(len, document["choices"])).index(len(document["choices"][document["answer"]]))
        for document in documents
    )
    assert max(ranks.values()) < 0.4 * len(documents)


def test_documents_are_the_same_every_time():
    assert cloze_documents() == cloze_documents()
