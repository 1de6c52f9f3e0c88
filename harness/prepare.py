"""A process of its own that finds out what cells need before they have ids: fetched models, calibration tokens.

Started as ``python -P -m harness.prepare QUESTION ANSWER``; both are JSON files. The answer lists every problem.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import atomic, processes
from harness.errors import HarnessError, Infrastructure
from harness.events import Events
from harness.presets import ModelSource, model_presets
from harness.progress import Progress


def prepare_model(source: ModelSource, question: Mapping[str, Any], inputs: Path, progress: Progress) -> dict[str, Any]:
    """Fetch one model, hash it, and write its calibration tokens. Raises HarnessError."""
    from harness.checkpoint import open_checkpoint
    from harness.fetch import fetch

    path = fetch(source, progress)
    progress("hash", 0, 1, source.name)
    facts = {"path": str(path), "weights_sha256": open_checkpoint(path).sha256(), "calibration_sha256": None}
    problems: list[HarnessError] = []
    if question["calibrate"]:
        progress("calibration", 0, 1, source.name)
        facts["calibration_sha256"], problems = _calibrate(path, question, inputs)
    return {"facts": facts, "problems": [describe(problem) for problem in problems]}


def _calibrate(path: Path, question: Mapping[str, Any], inputs: Path) -> tuple[str, list[HarnessError]]:
    """The calibration tokens' hash, under which they are written, and their overlaps with evaluation texts."""
    import safetensors.numpy
    from transformers import AutoTokenizer

    from harness.calibration import CalibrationSpec, calibration_ids, calibration_sha256
    from harness.tasks.catalogue import parse_task
    from harness.tasks.overlap import overlap_problems

    spec = CalibrationSpec.parse(question["calibration"])
    data_root = Path(question["data_root"]) if question["data_root"] else None
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    ids = calibration_ids(spec, tokenizer, data_root, question["seed"])
    digest = calibration_sha256(ids)
    target = inputs / f"{digest}.safetensors"
    if not target.is_file():
        atomic.write_bytes(target, safetensors.numpy.save({"ids": ids}))
    tasks = [parse_task(task) for task in question["tasks"]]
    return digest, overlap_problems(spec, ids, tasks, tokenizer, data_root)


def task_problems(question: Mapping[str, Any], progress: Progress) -> list[HarnessError]:
    """Load the data of every task once, while there may be a network: workers have none."""
    from harness.corpora import evaluation_text
    from harness.tasks.catalogue import parse_task

    data_root = Path(question["data_root"]) if question["data_root"] else None
    problems: list[HarnessError] = []
    for number, text in enumerate(question["tasks"]):
        task = parse_task(text)
        progress("task data", number, len(question["tasks"]), task.key)
        try:
            if task.kind != "lm_eval":
                evaluation_text(task.corpus, data_root)
            else:
                from harness.tasks.lm_eval_loading import load_tasks

                load_tasks(task, data_root)
        except HarnessError as problem:
            problems.append(problem)
    return problems


def describe(problem: HarnessError) -> dict[str, Any]:
    """A problem as JSON."""
    infrastructure = isinstance(problem, Infrastructure)
    return {"what": problem.what, "where": problem.where, "fix": problem.fix, "infrastructure": infrastructure}


def main() -> None:
    if not processes.die_with(int(os.environ["HARNESS_SUPERVISOR"])):
        return
    question_path, answer_path = map(Path, sys.argv[1:])
    question, progress = json.loads(question_path.read_text()), Events.from_environment()
    models: dict[str, Any] = {}
    problems = [describe(problem) for problem in task_problems(question, progress)]
    for row in question["models"]:
        preset, path = model_presets().get(row["preset"]), Path(row["path"]) if row["path"] else None
        source = ModelSource(row["name"], row["kind"], row["location"], row["revision"], path, preset)
        try:
            answer = prepare_model(source, question, question_path.parent, progress)
        except HarnessError as problem:
            problems.append(describe(problem))
        else:
            models[source.name] = answer["facts"]
            problems += answer["problems"]
    atomic.write_json(answer_path, {"models": models, "problems": problems})


if __name__ == "__main__":
    main()
