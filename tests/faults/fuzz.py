"""Everything that reads what others wrote, each as a function of bytes: only HarnessError may come out.

``python tests/faults/fuzz.py SECONDS [TARGET …]`` lets atheris look for inputs that do otherwise, coverage in hand.
"""

from __future__ import annotations

import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import artifacts, plan, request, results, store
from harness.calibration import CalibrationSpec
from harness.checkpoint import open_checkpoint
from harness.errors import HarnessError
from harness.limits import parse_bytes
from harness.planfile import read_plan
from harness.presets import resolve_model
from harness.registry import describe_methods, find_method
from harness.runfolder import CellFolder
from harness.settings import Setting
from harness.specs import Spec, bind
from harness.tasks.catalogue import parse_task
from harness.tasks.presets import expand
from harness.tasks.result_files import summary_path

METHODS = describe_methods()
TASK = "pydoc"


def setting(data: bytes, folder: Path) -> None:
    parsed = Setting.parse(_text(data))
    assert Setting.parse(str(parsed)) == parsed


def options(data: bytes, folder: Path) -> None:
    """Of every built-in method, and of the tasks: the words of a command line."""
    text = _text(data)
    spec = Spec.parse(text)
    bind(find_method(spec.name, METHODS).options, spec)


def words(data: bytes, folder: Path) -> None:
    text = _text(data)
    for read in (parse_task, CalibrationSpec.parse, parse_bytes, resolve_model, lambda t: expand([t])):
        try:
            read(text)
        except HarnessError:
            continue


def toml(data: bytes, folder: Path) -> None:
    path = folder / "sweep.toml"
    path.write_bytes(data)
    keys = request.read_toml(path)
    plan.draft(request.request_from(keys.values, {}), keys.problems)


def plan_file(data: bytes, folder: Path) -> None:
    path = folder / "plan.json"
    path.write_bytes(data)
    read_plan(path)
    list(results.measurement_rows(results.load(folder)))


def stored(data: bytes, folder: Path) -> None:
    path = folder / "run.sqlite"
    path.write_bytes(data)
    for beside in folder.glob("run.sqlite-*"):
        beside.unlink()
    store.read(path)
    store.Store(path).close()


def cell_results(data: bytes, folder: Path) -> None:
    """What a worker leaves: its end, what it says of the quantized model, the result of a task."""
    cell = CellFolder(folder)
    for path in (cell.end, cell.quantized_report, summary_path(cell.tasks, TASK)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    for read in (artifacts.result, artifacts.quantized, lambda one: artifacts.measured("0" * 16, one, TASK)):
        try:
            read(cell)
        except HarnessError:
            continue


def checkpoint(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes(b"{}")
    open_checkpoint(folder).block_linears()


def configuration(data: bytes, folder: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes(data)
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")  # sound, and empty
    open_checkpoint(folder)


def packed(data: bytes, folder: Path) -> None:
    from harness.kernels.packfile import load_packed
    from harness.quantized import QuantizedModel

    path = folder / "f.safetensors"
    path.write_bytes(data)
    for load in (load_packed, QuantizedModel.load):
        try:
            load(path)
        except HarnessError:
            continue


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    target.__name__: target
    for target in (
        setting, options, words, toml, plan_file, stored, cell_results, checkpoint, configuration, packed,
    )
}  # fmt: skip


def examine(name: str, data: bytes, folder: Path) -> bool:
    """Whether the input was taken. Raises whatever is not the harness's own error."""
    try:
        TARGETS[name](data, folder)
    except HarnessError:
        return False
    return True


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def main() -> None:
    import atexit
    import json
    import time

    import atheris

    seconds, names = float(sys.argv[1]), sys.argv[2:] or list(TARGETS)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    counts = dict.fromkeys(names, 0)
    slowest = dict.fromkeys(names, 0.0)

    def one(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        start = time.monotonic()
        examine(name, data[1:], folder)
        counts[name] += 1
        slowest[name] = max(slowest[name], time.monotonic() - start)

    atexit.register(lambda: print(json.dumps({"inputs": counts, "slowest_seconds": slowest})))
    atheris.instrument_all()
    limits = [f"-max_total_time={int(seconds)}", "-timeout=20", "-rss_limit_mb=2500", "-max_len=8192"]
    atheris.Setup([sys.argv[0], *limits, *corpus(folder, names)], one)
    atheris.Fuzz()


def corpus(folder: Path, names: list[str]) -> list[str]:
    """Sound files to start from, each behind the byte of its target."""
    from faults.seeds import seeds

    place = folder / "corpus"
    place.mkdir()
    for number, (name, data) in enumerate(seeds(folder)):
        if name in names:
            (place / str(number)).write_bytes(bytes([names.index(name)]) + data)
    return [str(place)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
