"""``harness run``: from a request to a finished run folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import artifacts, atomic, provenance
from harness.cells import Cell
from harness.checkpoint import open_checkpoint
from harness.endings import Ending
from harness.environment import allowed_with_network
from harness.errors import HarnessError, Infrastructure, Problems
from harness.executors import Executor
from harness.executors.local import LocalExecutor
from harness.limits import Limits, parse_bytes, processors
from harness.plan import Draft, complete
from harness.planfile import ModelFacts, Plan, grown, read_plan, refuse_other_terms, write_plan
from harness.pool import Command, Interrupted, Pool
from harness.presets import ModelSource
from harness.request import Request
from harness.runfolder import RunFolder
from harness.store import Run
from harness.supervisor import Supervisor, Watcher, child_environment


@dataclass(frozen=True)
class Outcome:
    """``cells`` are those that were asked for; ``signal`` is what stopped the run, if anything did."""

    cells: tuple[Cell, ...]
    signal: int | None


def run(draft: Draft, request: Request, folder: RunFolder, limits: Limits, watcher: Watcher, *, retry: bool) -> Outcome:
    """Run what is due of a request in its folder, or nothing at all where all is done.

    Raises HarnessError for a folder in use or begun on other terms, Infrastructure when the machine fails.
    """
    refuse_other_terms(read_plan(folder.plan), draft, folder.path)
    with folder.claimed() as claim:
        old = read_plan(folder.plan)
        facts = _facts(draft, folder, old, watcher)
        cells = complete(draft, facts)
        plan = grown(old, draft, facts, cells, folder.path)
        write_plan(folder.plan, plan)
        executor = executor_of(request, folder, limits)
        supervisor = Supervisor(
            claim, plan.cells, cells, executor, limits.threads, watcher, lambda: _start(request, limits), retry
        )
        return Outcome(tuple(cells), supervisor.run())


def executor_of(request: Request, folder: RunFolder, limits: Limits) -> Executor:
    """Where the cells of a run are computed."""
    if request.executor == "local":
        return LocalExecutor(folder, limits)
    from harness.executors.cluster import RayExecutor

    return RayExecutor(folder, limits, address=request.address, artifacts=request.artifacts, jobs=request.jobs)


def limits_of(request: Request) -> Limits:
    """Raises HarnessError for a memory size that is none."""
    return Limits(
        jobs=request.jobs or 1,
        threads=request.threads or processors(),
        timeout_seconds=request.timeout,
        memory_bytes=parse_bytes(request.memory) if request.memory else None,
    )


def _facts(draft: Draft, folder: RunFolder, old: Plan | None, watcher: Watcher) -> dict[str, ModelFacts]:
    """What must be known of the models: from the plan where it still holds, otherwise found out."""
    known = dict(old.facts) if old else {}
    unknown = [source for source in draft.models if not _holds(known.get(source.name), source, draft, folder)]
    found = _prepare(draft, unknown, folder, watcher) if unknown else {}
    return {source.name: found.get(source.name) or known[source.name] for source in draft.models}


def _holds(facts: ModelFacts | None, source: ModelSource, draft: Draft, folder: RunFolder) -> bool:
    if facts is None or facts.path != source.path or open_checkpoint(facts.path).sha256() != facts.weights_sha256:
        return False
    if not draft.methods:
        return True
    calibrated = facts.calibration_sha256 is not None and folder.calibration(facts.calibration_sha256).is_file()
    return calibrated and {task.key for task in draft.tasks} <= set(facts.checked_tasks)


def _prepare(draft: Draft, sources: list[ModelSource], folder: RunFolder, watcher: Watcher) -> dict[str, ModelFacts]:
    """Ask :mod:`harness.prepare`. Raises Problems with all it found, Infrastructure when it could not do its work."""
    question, answer = folder.inputs / "question.json", folder.inputs / "answer.json"
    tasks = [task.key for task in draft.tasks]
    atomic.write_json(question, {
        "models": [_described(source) for source in sources],
        "calibrate": bool(draft.methods),
        "calibration": str(draft.calibration),
        "seed": draft.seed,
        "data_root": str(draft.data_root) if draft.data_root else None,
        "tasks": tasks,
    })  # fmt: skip
    answer.unlink(missing_ok=True)
    found = _ask(question, answer, folder, watcher)
    problems = [HarnessError(row["what"], where=row["where"], fix=row["fix"]) for row in found["problems"]]
    if problems and any(row["infrastructure"] for row in found["problems"]):
        raise Infrastructure("\n".join(map(str, problems)))
    if problems:
        raise Problems(list({str(problem): problem for problem in problems}.values()))
    return {
        name: ModelFacts(
            Path(row["path"]), row["weights_sha256"], row["calibration_sha256"], tuple(tasks) if draft.methods else ()
        )
        for name, row in found["models"].items()
    }


def _ask(question: Path, answer: Path, folder: RunFolder, watcher: Watcher) -> Mapping[str, Any]:
    name, log = "prepare", folder.inputs / "prepare.log"

    pool, seconds = Pool(Limits()), 0.0
    words = (sys.executable, "-P", "-m", "harness.prepare", str(question.resolve()), str(answer.resolve()))
    # The only child that may use the network and the hub's token: it fetches models, and runs no method.
    environment = {**allowed_with_network(), **child_environment(folder)}
    watcher.started(name, "preparing models and calibration")
    for _, happening in pool.run([Command(name, words, environment, log.resolve())]):
        match happening:
            case Ending():
                seconds = happening.seconds
            case event:
                watcher.progress(name, event["stage"], event["done"], event["total"], event["detail"])
    if pool.interrupted_by is not None:
        raise Interrupted(pool.interrupted_by)
    found: dict[str, Any] | None = json.loads(answer.read_text()) if answer.is_file() else None
    status = "ok" if found and not found["problems"] else "stopped"
    watcher.ended(name, "preparing models and calibration", status, None, seconds)
    if found is None:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise Infrastructure(f"preparing the run failed: {lines[-1]}", where=str(log), fix="read the log")
    return found


def _described(source: ModelSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "kind": source.kind,
        "location": source.location,
        "revision": source.revision,
        "path": str(source.path) if source.path else None,
        "preset": source.preset.name if source.preset else None,
    }


def _start(request: Request, limits: Limits) -> Run:
    recorded = json.dumps(provenance.capture(limits.threads), sort_keys=True)
    return Run(artifacts.now(), json.dumps(asdict(request), sort_keys=True), recorded)
