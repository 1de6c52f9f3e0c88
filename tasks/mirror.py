"""Fill a data root with what tasks read, on a machine that reaches the hub, for one that does not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from harness import atomic
from harness.corpora import CORPORA, corpus_problem, rows_of
from harness.progress import Progress
from harness.tasks.catalogue import OFFLINE_TASKS, TaskSpec
from harness.tasks.lm_eval_loading import load_tasks

DEFAULT_CONFIG = "default"


def mirror(specs: Sequence[TaskSpec], to: Path, source: Path | None, progress: Progress) -> list[Path]:
    """Write every split that the tasks' datasets have below ``to``, and a card in each dataset's folder.

    ``source`` is a data root to copy from, None the hub. Returns the dataset folders. Raises HarnessError for a task
    that cannot be loaded; what was written by then stays.
    """
    folders: dict[Path, None] = {}
    for number, spec in enumerate(specs):
        progress("mirror", number, len(specs), spec.name)
        tables = _corpus_tables(spec, source) if spec.kind != "lm_eval" else _task_tables(spec, source)
        for repository, config, split, table in tables:
            folder = to / repository
            with atomic.replacing(folder / config / f"{split}-00000-of-00001.parquet") as temporary:
                table.to_parquet(str(temporary))
            folders[folder] = None
    for folder in folders:
        atomic.write_text(folder / "README.md", card(folder))
    progress("mirror", len(specs), len(specs), str(to))
    return list(folders)


def card(folder: Path) -> str:
    """The front matter by which ``datasets`` finds configurations and splits below a dataset's folder."""
    lines = ["---", "configs:"]
    for config in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines += [f"- config_name: {config.name}", "  data_files:"]
        for split in sorted({re.sub(r"-\d+-of-\d+$", "", file.stem) for file in config.glob("*.parquet")}):
            lines += [f"  - split: {split}", f"    path: {config.name}/{split}-*.parquet"]
    return "\n".join([*lines, "---", ""])


def _corpus_tables(spec: TaskSpec, source: Path | None) -> list[tuple[str, str, str, Any]]:
    corpus = CORPORA[spec.corpus]
    if corpus.repository is None:
        return []
    if problem := corpus_problem(corpus.name, corpus.evaluation_split, source):
        raise problem
    tables = []
    for split in corpus.splits:
        if corpus_problem(corpus.name, split, source) is None:
            table = datasets.Dataset.from_dict({"text": rows_of(corpus.name, split, source)})
            tables.append((corpus.repository, corpus.config, split, table))
    return tables


def _task_tables(spec: TaskSpec, source: Path | None) -> list[tuple[str, str, str, Any]]:
    if spec.name in OFFLINE_TASKS:
        return []
    return [
        (task.config.dataset_path, task.config.dataset_name or DEFAULT_CONFIG, str(split), table)
        for task in load_tasks(spec, source)["tasks"].values()
        for split, table in task.dataset.items()
    ]
