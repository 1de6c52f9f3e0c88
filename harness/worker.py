"""The child that computes one cell: ``python -P -m harness.worker CELLDIR``.

Every result is a file that is there whole or not at all, so it can be killed anywhere and started again. It never
touches the store. Where its output goes, the supervisor decides: this process's stdout and stderr are the cell's log.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import atomic, processes
from harness.cells import Cell
from harness.endings import Status
from harness.errors import BadOutput, HarnessError, Infrastructure, Unsupported
from harness.events import Events
from harness.placement import Placement
from harness.registry import create_method, describe_methods, find_method
from harness.runfolder import CellFolder, RunFolder
from harness.settings import Setting
from harness.tasks.catalogue import TaskSpec, parse_task
from harness.tasks.result_files import read_summary

if TYPE_CHECKING:  # the heavy half is imported when the cell is known to need it
    import torch

    from harness.kernels.difference import Executions
    from harness.method import Method
    from harness.models import LoadedModel
    from harness.quantizedfile import QuantizedFile

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


@dataclass
class Timings:
    """Seconds of each part of the work, None for a part that was not reached or not needed."""

    seconds: dict[str, float | None] = field(
        default_factory=lambda: {"load_seconds": None, "quantize_seconds": None, "evaluate_seconds": None}
    )

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[f"{part}_seconds"] = time.monotonic() - start


@dataclass(frozen=True)
class Job:
    """A cell, where it lies, and how to say how far it is."""

    cell: Cell
    folder: CellFolder
    threads: int
    placement: Placement
    progress: Events
    timings: Timings

    def run(self) -> None:
        """The main path. Raises what goes wrong; whatever is finished by then stays."""
        pending = self.pending_tasks()
        if not pending and self.folder.quantized_report.is_file():
            return
        method = self.method()
        with self.timings.timing("load"):
            model = self.load()
        executions: Callable[[], Executions] | None = None
        if method is not None:
            with self.timings.timing("quantize"):
                quantized = self.quantize(model, method)
            model.weights.quantize(quantized, model.architecture)
            executions = functools.cache(functools.partial(self.executions, model, quantized))
            if self.cell.execute == "kernels":
                self.run_through_kernels(model, executions())
        else:
            self.report_unquantized(model)
        with self.timings.timing("evaluate"):
            self.evaluate(pending, model, executions)

    def pending_tasks(self) -> list[TaskSpec]:
        return [parse_task(task) for task in self.cell.tasks if read_summary(self.folder.tasks, task) is None]

    def method(self) -> Method | None:
        """The method, None for the baseline. Raises Unsupported before anything heavy is loaded."""
        if self.cell.is_baseline:
            return None
        found = find_method(self.cell.method_source, describe_methods())
        if found.sha256 != self.cell.method_sha256:
            raise HarnessError(
                "the method's file has changed since the run was planned", fix="run the same command again"
            )
        method = create_method(self.cell.method_source, self.cell.options)
        if reason := method.supports(Setting.parse(self.cell.setting)):
            raise Unsupported(reason)
        return method

    def load(self) -> LoadedModel:
        make_deterministic(self.threads, self.cell.seed)
        self.progress("load", 0, 1, self.cell.model)
        return self._model()

    def _model(self) -> LoadedModel:
        from harness.models import load_model

        cell = self.cell
        return load_model(
            Path(cell.model_path), name=cell.model, dtype=cell.dtype, device=cell.device, placement=self.placement
        )

    def quantize(self, model: LoadedModel, method: Method) -> QuantizedFile:
        """The quantized model: its artifact if that is whole, otherwise computed and written."""
        from harness.driver import quantize_to_files
        from harness.quantizedfile import QuantizedFile

        artifact = QuantizedFile(self.folder.quantized)
        if self.folder.quantized_report.is_file():
            return artifact
        start = time.monotonic()
        windows = quantize_to_files(
            model,
            method,
            Setting.parse(self.cell.setting),
            self.calibration() if method.reads else None,
            seed=self.cell.seed,
            checkpoints=self.folder.windows,
            progress=self.progress,
            spill=self.placement.spill,
        )
        windows.join_into(self.folder.quantized)
        report = [row for window in windows.results() for row in window.report]
        self.write_report(time.monotonic() - start, artifact.bits_per_weight, artifact.packed_bytes, report)
        windows.remove()
        return artifact

    def calibration(self) -> torch.Tensor:
        """Token ids [sequences, length], the same for every method of the run."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from harness.calibration import calibration_sha256

        assert self.cell.calibration_sha256 is not None
        path = RunFolder(self.folder.path.parents[1]).calibration(self.cell.calibration_sha256)
        fix = "delete the file and run the same command: it is written again"
        try:
            ids = load_file(path)["ids"]
        except (SafetensorError, OSError, KeyError) as error:
            raise HarnessError(f"the calibration tokens cannot be read: {error}", where=str(path), fix=fix) from error
        if calibration_sha256(ids.numpy()) != self.cell.calibration_sha256:
            raise HarnessError("the calibration tokens are not those of the plan", where=str(path), fix=fix)
        return ids

    def executions(self, model: LoadedModel, quantized: QuantizedFile) -> Executions:
        """The simulation that is in place, and the kernels on the packed layers as they lie on disk."""
        from harness.kernels.difference import Executions
        from harness.kernels.execute import kernel_modules, packed_layers
        from harness.kernels.packfile import load_packed, packed_from, save_packed
        from harness.kernels.precision import check_precision

        if not self.folder.packed.is_file() or packed_from(self.folder.packed) != quantized.sha256:
            save_packed(packed_layers(quantized.part().linears), self.folder.packed, quantized.sha256)
        kernels = kernel_modules(load_packed(self.folder.packed), model.architecture.shared_inputs, model.device)
        simulation = {name: model.module.get_submodule(name) for name in kernels}
        return Executions(simulation, kernels, check_precision(kernels, [1, 64], model.module.dtype))

    def run_through_kernels(self, model: LoadedModel, executions: Executions) -> None:
        """What is evaluated from here on is what the kernels compute."""
        from harness.kernels.execute import put_in_place

        put_in_place(model.module, executions.kernels)

    def report_unquantized(self, model: LoadedModel) -> None:
        from harness.quantized import unquantized_size

        if not self.folder.quantized_report.is_file():
            self.write_report(0.0, *unquantized_size(model.module, model.architecture), ())

    def write_report(self, seconds: float, bits_per_weight: float, packed_bytes: int, report: Sequence[Any]) -> None:
        atomic.write_json(self.folder.quantized_report, {
            "quantize_seconds": seconds,
            "bits_per_weight": bits_per_weight,
            "packed_bytes": packed_bytes,
            "report": list(report),
        })  # fmt: skip

    def evaluate(
        self, pending: Sequence[TaskSpec], model: LoadedModel, executions: Callable[[], Executions] | None
    ) -> None:
        """Evaluate the tasks; each is written, then announced, as soon as it is final."""
        from harness.tasks.evaluate import evaluate
        from harness.tasks.measurement import write_result

        data_root = Path(self.cell.data_root) if self.cell.data_root else None
        results = evaluate(
            pending,
            model,
            reference=None if self.cell.is_baseline else self._model,
            executions=executions,
            data_root=data_root,
            seed=self.cell.seed,
            progress=self.progress,
        )
        for result in results:
            write_result(self.folder.tasks, result)
            self.progress.send("measured", task=result.task)


def make_deterministic(threads: int, seed: int) -> None:
    """Same seed, same kind of machine: the same bits."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def how_it_ended(work: Callable[[], None]) -> tuple[Status, str | None]:
    """Run ``work`` and name its end. The traceback of an unforeseen end goes to stderr, which is the cell's log."""
    try:
        work()
    except Unsupported as error:
        return "unsupported", error.what
    except BadOutput as error:
        return "bad_output", error.what + (f" ({error.where})" if error.where else "")
    except Infrastructure as error:
        return "infra", error.what
    except HarnessError as error:
        print(error, file=sys.stderr)
        return "error", error.what
    except BaseException as error:  # noqa: BLE001  # whatever a method raises, SystemExit too, ends this cell only
        traceback.print_exc()
        return _status_of(error), traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return "ok", None


def _status_of(error: BaseException) -> Status:
    if isinstance(error, MemoryError):
        return "oom_host"
    if isinstance(error, OSError) and error.errno in _FULL:
        return "infra"
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if "torch.OutOfMemoryError" in kinds or "torch.cuda.OutOfMemoryError" in kinds:
        return "oom_gpu"
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "oom_host"
    if "safetensors_rust.SafetensorError" in kinds and "os error 28" in str(error):
        return "infra"
    return "error"


def main() -> None:
    if not processes.die_with(int(os.environ["HARNESS_SUPERVISOR"])):
        return
    folder, progress, timings = CellFolder(Path(sys.argv[1])), Events.from_environment(), Timings()
    asked = json.loads(folder.cell.read_text())
    placement = Placement.named(asked["placement"], folder.path)
    job = Job(Cell.from_json(asked["cell"]), folder, asked["threads"], placement, progress, timings)
    print(f"--- attempt {asked['attempt']}: {job.cell.model} {job.cell.setting} {job.cell.label}", flush=True)
    status, reason = how_it_ended(job.run)
    end = {"attempt": asked["attempt"], "status": status, "reason": reason, **timings.seconds}
    end["peak_memory_bytes"] = processes.peak_resident_bytes()
    with contextlib.suppress(OSError):  # a full disk: the pipe still works, and so the supervisor is told
        atomic.write_json(folder.end, end)
    progress.send("end", **end)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # freeing a large model object by object takes seconds and can still crash


if __name__ == "__main__":
    main()
