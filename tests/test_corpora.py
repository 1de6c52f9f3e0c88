from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.corpora import CORPORA, corpus_problem, documents, evaluation_text, pydoc_topics, text_sha256
from harness.errors import HarnessError


def paragraphs(split):
    return [" ".join(p.split()) for text in pydoc_topics(split).values() for p in text.split("\n\n") if p.strip()]


@pytest.fixture
def data_root(tmp_path):
    """Three articles of WikiText and two pages of C4, laid out as on the hub."""
    rows = ["", " = One = \n", "", " First text . \n", " = = Part = = \n", " a \n", " = not a title = \n", " b \n", ""]
    rows += [" = Two = \n", "", " Second text . \n", "", " = Three = \n", "", " Third . \n"]
    for folder, files in {
        "Salesforce/wikitext/wikitext-2-raw-v1": {"test": rows, "train": rows[:9]},
        "allenai/c4/en": {"validation": ["page one", "page two"]},
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        for split, texts in files.items():
            pq.write_table(pa.table({"text": texts}), tmp_path / folder / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_pydoc_parts_share_no_paragraph_and_repeat_none():
    train, test = paragraphs("train"), paragraphs("test")
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)


def test_pydoc_parts_are_both_of_use():
    assert all(sum(map(len, pydoc_topics(split).values())) > 100_000 for split in ("train", "test"))


def test_a_topic_stays_in_its_part_when_others_come_and_go(monkeypatch):
    from pydoc_data import topics

    before = {split: set(pydoc_topics(split)) for split in ("train", "test")}
    monkeypatch.setattr(topics, "topics", {name: text + "\n\nnew in " + name for name, text in topics.topics.items()})
    after = {split: set(pydoc_topics(split)) for split in ("train", "test")}
    assert all(before[split] <= after[split] for split in before)
    assert not after["train"] & after["test"]


def test_wikitext_evaluation_text_is_the_rows_joined_by_blank_lines(data_root):
    text = evaluation_text("wikitext2", data_root)
    assert text.startswith("\n\n = One = \n\n\n\n\n First text . \n\n\n = = Part")
    assert text_sha256(text) == text_sha256(evaluation_text("wikitext2", data_root))


def test_wikitext_documents_are_articles(data_root):
    articles = documents("wikitext2", "test", data_root)
    assert [re.match(r" = (\w+) = ", article)[1] for article in articles] == ["One", "Two", "Three"]
    assert "not a title" in articles[0]


def test_c4_evaluation_text_is_the_pages_joined_by_a_space(data_root):
    assert evaluation_text("c4", data_root) == "page one page two"


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("c4", "train", "no train split of c4"),
        ("wikitext2", "validation", "no validation split of wikitext2"),
        ("c4", "test", "c4 has no split 'test'"),
    ],
)
def test_what_the_data_root_lacks_is_named_with_a_fix(data_root, name, split, message):
    problem = corpus_problem(name, split, data_root)
    assert message in str(problem)
    assert problem.fix
    with pytest.raises(HarnessError, match=re.escape(message)):
        documents(name, split, data_root)


def test_a_missing_data_root_is_a_problem_and_pydoc_needs_none(tmp_path):
    assert "not a folder" in str(corpus_problem("c4", "train", tmp_path / "nowhere"))
    assert corpus_problem("pydoc", "train", tmp_path / "nowhere") is None


def test_without_data_root_and_hub_the_problem_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "--data-root" in str(corpus_problem("c4", "train", None))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert corpus_problem("c4", "train", None) is None


def test_unknown_corpus_gets_the_nearest_name():
    with pytest.raises(HarnessError, match="wikitext2"):
        corpus_problem("wikitext", "test", None)


def test_an_unreadable_file_is_named(data_root):
    (data_root / "allenai/c4/en/validation-00000-of-00001.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(HarnessError, match=r"validation-00000-of-00001\.parquet"):
        evaluation_text("c4", data_root)


def test_real_wikitext_is_the_published_file(shared_data):
    assert len(documents("wikitext2", "test", shared_data)) == 60
    assert len(evaluation_text("wikitext2", shared_data)) == 1_294_336


def test_every_corpus_says_how_its_evaluation_text_is_made():
    assert all(corpus.rule and corpus.evaluation_split in corpus.splits for corpus in CORPORA.values())
