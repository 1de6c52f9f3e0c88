"""The texts that calibrate and that perplexity is measured on: ``pydoc``, ``wikitext2``, ``c4``.

A corpus is a list of documents a split. With a data root its parquet files are read from there and nothing else is
asked; without one, :mod:`datasets` loads it from the hub or from its own cache. ``pydoc`` is part of Python.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError, Infrastructure, unknown


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lives on the hub, and how its evaluation split becomes one text."""

    name: str
    summary: str
    splits: tuple[str, ...]
    evaluation_split: str
    joiner: str  # between the units of the evaluation text
    rule: str  # the same in words, for manifests
    repository: str | None = None
    config: str = ""
    hub_file: str = ""  # a shard to take instead of a whole split, with the split's name in braces
    evaluation_units: int | None = None  # how many rows the evaluation text takes; None: all


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="pydoc",
            summary="prose of Python's own documentation (pydoc_data.topics); on every machine",
            splits=("train", "test"),
            evaluation_split="test",
            joiner="\n\n",
            rule="topics of the test part in the order of their names, joined by a blank line",
        ),
        Corpus(
            name="wikitext2",
            summary="WikiText-2, raw",
            splits=("train", "validation", "test"),
            evaluation_split="test",
            joiner="\n\n",
            rule="all rows joined by a blank line (GPTQ protocol)",
            repository="Salesforce/wikitext",
            config="wikitext-2-raw-v1",
        ),
        Corpus(
            name="c4",
            summary="C4, English web pages",
            splits=("train", "validation"),
            evaluation_split="validation",
            joiner=" ",
            rule="the first 1,100 documents joined by a space (GPTQ protocol)",
            repository="allenai/c4",
            config="en",
            hub_file="en/c4-{split}.00000-of-*.json.gz",
            evaluation_units=1100,
        ),
    )
}


def corpus_named(name: str) -> Corpus:
    """Raises HarnessError, with the nearest names, for one that is not there."""
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA, listing="harness list tasks")
    return CORPORA[name]


def corpus_problem(name: str, split: str, data_root: Path | None) -> HarnessError | None:
    """What keeps ``split`` of a corpus from being read, by looking at paths only; None if nothing does.

    Raises HarnessError for an unknown corpus. Without a data root a corpus that needs one counts as readable unless
    the hub is switched off: whether the hub answers is found out by asking it.
    """
    corpus = corpus_named(name)
    if split not in corpus.splits:
        return HarnessError(f"{name} has no split {split!r}", fix=f"choose from {', '.join(corpus.splits)}")
    if corpus.repository is None:
        return None
    if data_root is None:
        if not hub_is_off():
            return None
        return HarnessError(
            f"{name} is not on this machine, and the hub is switched off (HF_HUB_OFFLINE)",
            fix="give --data-root (or HARNESS_DATA_ROOT), or use pydoc, which needs no data",
        )
    if not data_root.is_dir():
        return HarnessError("the data root is not a folder", where=str(data_root), fix="correct --data-root")
    if not _parquet_files(corpus, split, data_root):
        return HarnessError(
            f"the data root has no {split} split of {name}",
            where=str(data_root / (corpus.repository or "") / corpus.config / f"{split}-*.parquet"),
            fix=f"put the hub's {corpus.repository} there, or leave --data-root out to use the hub",
        )
    return None


def hub_is_off() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def documents(name: str, split: str, data_root: Path | None) -> list[str]:
    """The documents of a split, in order: topics, articles or web pages.

    A WikiText-2 document is an article: the rows from one title to the next, joined by a blank line.
    Raises HarnessError for what :func:`corpus_problem` finds, Infrastructure if the hub does not deliver.
    """
    units = rows_of(name, split, data_root)
    return _articles(units) if name == "wikitext2" else units


def evaluation_text(name: str, data_root: Path | None, *, split: str | None = None) -> str:
    """The text that perplexity on this corpus is measured on: one string, put together by the corpus's ``rule``."""
    corpus = corpus_named(name)
    units = rows_of(name, split or corpus.evaluation_split, data_root)
    return corpus.joiner.join(units[: corpus.evaluation_units])


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rows_of(name: str, split: str, data_root: Path | None) -> list[str]:
    """The rows of a split as they are stored (for pydoc: the topics). Raises as :func:`documents`."""
    problem = corpus_problem(name, split, data_root)
    if problem is not None:
        raise problem
    corpus = corpus_named(name)
    if corpus.repository is None:
        return list(pydoc_topics(split).values())
    return _from_hub(corpus, split) if data_root is None else _from_folder(corpus, split, data_root)


# --- pydoc -----------------------------------------------------------------------------------------------------------


def pydoc_topics(split: str) -> dict[str, str]:
    """Topic name -> text, sorted by name.

    A topic's part follows from a hash of its name alone, so it stays the same over Python versions. Topics quote one
    another at length (``specialnames`` holds all of ``customization``); so each paragraph is kept once, in the first
    topic that has it, and the train part loses every paragraph with eight words in a row from the test part.
    """
    from pydoc_data.topics import topics  # 0.5 MB of text, needed by few commands

    parts: dict[str, list[str]] = {"test": [], "train": []}
    for topic in sorted(topics):
        parts[_pydoc_part(topic)].append(topic)
    seen: set[str] = set()
    test = {topic: _new_paragraphs(topics[topic], seen) for topic in parts["test"]}
    kept = test
    if split == "train":
        tested = {run for paragraphs in test.values() for paragraph in paragraphs for run in _word_runs(paragraph)}
        train = {topic: _new_paragraphs(topics[topic], seen) for topic in parts["train"]}
        kept = {topic: [p for p in paragraphs if not _word_runs(p) & tested] for topic, paragraphs in train.items()}
    return {topic: "\n\n".join(paragraphs) for topic, paragraphs in kept.items() if paragraphs}


def _pydoc_part(topic: str) -> str:
    return "test" if hashlib.sha256(topic.encode()).digest()[0] < 77 else "train"  # 77 of 256: 30 % of the topics


def _new_paragraphs(text: str, seen: set[str]) -> list[str]:
    """Paragraphs whose words are not in ``seen``, which grows by them."""
    new = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            new.append(paragraph.strip("\n"))
    return new


def _word_runs(paragraph: str, length: int = 8) -> set[tuple[str, ...]]:
    words = paragraph.split()
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


# --- WikiText-2 and C4 -----------------------------------------------------------------------------------------------


def _parquet_files(corpus: Corpus, split: str, data_root: Path) -> list[Path]:
    folder = data_root / (corpus.repository or "") / corpus.config
    return sorted(folder.glob(f"{split}-*.parquet"))


def _from_folder(corpus: Corpus, split: str, data_root: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    rows: list[str] = []
    for path in _parquet_files(corpus, split, data_root):
        try:
            rows += pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise HarnessError(
                f"{corpus.name}: a data file cannot be read: {error}", where=str(path), fix="fetch the file again"
            ) from error
    return rows


def _from_hub(corpus: Corpus, split: str) -> list[str]:
    import datasets

    files = {split: corpus.hub_file.format(split=split)} if corpus.hub_file else None
    name = None if files else corpus.config
    try:
        table = datasets.load_dataset(corpus.repository or "", name, data_files=files, split=split)
    except (OSError, ValueError) as error:  # what datasets raises for a hub or a cache that has it not
        raise Infrastructure(
            f"{corpus.name} could not be loaded from the hub: {error}",
            fix="give --data-root (or HARNESS_DATA_ROOT), or use pydoc, which needs no data",
        ) from error
    return list(table["text"])


def _articles(rows: list[str]) -> list[str]:
    """Rows grouped by the titles, which stand alone: `` = Title = `` with an empty row before and after it."""
    articles: list[list[str]] = []
    for before, row, after in zip(["", *rows], rows, [*rows[1:], ""], strict=False):
        if row.startswith(" = ") and not row.startswith(" = = ") and not before and not after:
            articles.append([])
        if articles:
            articles[-1].append(row)
    return ["\n\n".join(article) for article in articles]
