"""Checkpoints, files and names that somebody made to do harm."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.quick import Quick, results

from harness.checkpoint import open_checkpoint
from harness.errors import HarnessError, Problems
from harness.plan import draft

REFUSED, HARMLESS = "refused", "harmless"
Plant = Callable[[Path, Path], None]  # the checkpoint's folder, the file whose presence tells that code ran


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def only_pickled(name: str) -> Plant:
    def plant(folder: Path, mark: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))

    return plant


def pickled_beside(folder: Path, mark: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.00.pth", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))


def pickle_by_another_name(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))


def archive_by_another_name(folder: Path, mark: Path) -> None:
    """As torch.save writes it, with a member that climbs out of the folder."""
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(mark)))
        archive.writestr(f"../../../../../..{mark}", "")


def _code(folder: Path, mark: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tok: pass\n"
    )


def code_for_an_unknown_model(folder: Path, mark: Path) -> None:
    _code(folder, mark, "modeling_evil")
    _changed(
        folder / "config.json", model_type="evil", architectures=["Model"],
        auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
    )  # fmt: skip


def code_for_a_known_model(folder: Path, mark: Path) -> None:
    _code(folder, mark, "modeling_evil")
    _changed(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Model"}, trust_remote_code=True)


def code_for_a_tokenizer(folder: Path, mark: Path) -> None:
    _code(folder, mark, "tokenization_evil")
    auto_map = {"AutoTokenizer": ["tokenization_evil.Tok", "tokenization_evil.Tok"]}
    _changed(folder / "tokenizer_config.json", tokenizer_class="Tok", auto_map=auto_map)


def an_adapter(folder: Path, mark: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"})
    )
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))


def weights_elsewhere(folder: Path, mark: Path) -> None:
    (folder.parent / "outside.bin").write_bytes(pickle.dumps(Payload(mark)))
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_kernel_from_a_hub(folder: Path, mark: Path) -> None:
    _changed(folder / "config.json", attn_implementation="evil/kernel", _attn_implementation="evil/kernel")


PLANTED: dict[str, tuple[Plant, str]] = {
    "pytorch_model.bin": (only_pickled("pytorch_model.bin"), REFUSED),
    "model.pt": (only_pickled("model.pt"), REFUSED),
    "model.pth": (only_pickled("model.pth"), REFUSED),
    "model.ckpt": (only_pickled("model.ckpt"), REFUSED),
    "pickles beside sound weights": (pickled_beside, HARMLESS),
    "a pickle named safetensors": (pickle_by_another_name, REFUSED),
    "an archive named safetensors": (archive_by_another_name, REFUSED),
    "code for an unknown model": (code_for_an_unknown_model, REFUSED),
    "code for a known model": (code_for_a_known_model, HARMLESS),
    "code for a tokenizer": (code_for_a_tokenizer, HARMLESS),
    "an adapter": (an_adapter, REFUSED),
    "weights outside the folder": (weights_elsewhere, REFUSED),
    "a kernel from a hub": (a_kernel_from_a_hub, HARMLESS),
}


def _changed(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a careless user may have it set."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")


@pytest.mark.fault(26)
@pytest.mark.filterwarnings("ignore")  # transformers has its own to say about them
def test_26_code_in_checkpoints_never_runs(tiny_folder: Path, tmp_path: Path, told: None, figure) -> None:
    from harness.models import load_model

    ran, ends = [], []
    for number, (name, (plant, expected)) in enumerate(PLANTED.items()):
        folder, mark = tmp_path / str(number) / "model", tmp_path / f"ran-{number}"
        shutil.copytree(tiny_folder, folder)
        plant(folder, mark)
        try:
            load_model(folder, name=name, dtype="float32", device="cpu")
            end = HARMLESS
        except HarnessError as error:
            assert str(error) != error.what, name  # noqa: PT017  # it says where, or what to do
            end = REFUSED
        assert end == expected or (expected == HARMLESS and end == REFUSED), name
        ends.append(end)
        ran += [name] if mark.exists() else []
    assert ran == []
    figure(
        26, f"{len(ran)} of {len(PLANTED)} payloads ran; {ends.count(REFUSED)} refused, the others loaded without them"
    )


@pytest.mark.fault(26)
def test_26_a_chat_template_cannot_reach_python(tiny_model, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for reach in ("cycler.__init__.__globals__.os", "self.__init__.__globals__['__builtins__'].__import__('os')"):
        tiny_model.tokenizer.chat_template = f"{{{{ {reach}.system('touch {mark}') }}}}"
        with pytest.raises(Exception, match=r"unsafe|undefined|not callable|no attribute"):
            tiny_model.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not mark.exists()


@pytest.mark.fault(26)
def test_26_no_pickle_among_our_own_files(tmp_path: Path) -> None:
    """Artifacts, packed layers and window states that were replaced by pickles."""
    from harness.kernels.packfile import load_packed
    from harness.quantized import QuantizedModel
    from harness.windowfiles import WindowFiles

    mark, path = tmp_path / "ran", tmp_path / "00000.safetensors"
    path.write_bytes(pickle.dumps(Payload(mark)))
    for load in (QuantizedModel.load, load_packed, lambda one: WindowFiles(one.parent).load(0)):
        with pytest.raises(HarnessError):
            load(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # the payload does work
    assert mark.exists()


@pytest.mark.fault(26)
def test_26_no_module_of_ours_can_unpickle() -> None:
    """Nothing imports what reads pickles, calls what would, or trusts code of others."""
    import re

    root = Path(__file__).parents[2]
    forbidden = re.compile(
        r"\b(import (pickle|dill|cloudpickle|joblib|shelve)\b|from (pickle|dill|cloudpickle|joblib|shelve)\b"
        r"|torch\.load\("
        r"|allow_pickle=True|trust_remote_code=True|yaml\.(unsafe_)?load\(|(?<!\.)\beval\(|\bexec\(|shell=True|os\.system\()"
    )
    sources = [
        path for top in ("harness", "methods", "kernels", "tasks", "reports") for path in (root / top).glob("**/*.py")
    ]
    found = [f"{path.name}: {match[0]}" for path in sources for match in forbidden.finditer(path.read_text())]
    assert len(sources) > 80
    assert found == ["lm_eval_index.py: yaml.load("]  # with a SafeLoader of its own


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("what", "length", "filler"),
    [("a header of 200 MB", 200_000_000, None), ("a header of 2^60 bytes", 2**60, None), ("nested", 100_000, b"[")],
)
def test_27_header_bombs(tmp_path: Path, what: str, length: int, filler: bytes | None, figure) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    with path.open("wb") as stream:
        stream.write(length.to_bytes(8, "little"))
        if filler:
            stream.write(filler * length)
        else:
            stream.truncate(min(length, 200_000_000) + 8)  # a hole: it takes no disk
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(HarnessError, match="is not a sound safetensors file"):
        open_checkpoint(tmp_path)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 20
    figure(27, f"{what}: refused in {seconds * 1e3:.0f} ms, {peak:.1f} MB")


NAMES = (
    "../../x",
    "/etc",
    "a;rm -rf .",
    "x" * 5000,
    "W４A16",
    "rtn\u200b",
    "<script>",
    "=cmd()",
    "a|b",
    "$(id)",
    "\x1b[31m",
    "a\0b",
)


@pytest.mark.fault(28)
def test_28_names_are_refused_before_anything_is_written(quick: Quick, tmp_path: Path, monkeypatch, figure) -> None:
    from dataclasses import replace

    monkeypatch.chdir(tmp_path)
    before, refused = set(tmp_path.rglob("*")), 0
    for name in NAMES:
        for key in ("methods", "settings", "tasks"):
            with pytest.raises(Problems):
                draft(replace(quick.request(), **{key: (name,)}))
            refused += 1
    assert set(tmp_path.rglob("*")) == before
    figure(28, f"{refused} hostile names refused, 0 files written")


@pytest.mark.fault(28)
def test_28_a_folder_name_is_escaped_wherever_it_is_shown(quick: Quick, tmp_path: Path, figure) -> None:
    """The model's folder is the one name that comes from the disk."""
    name = "=x|<script>alert(1)<"
    model = tmp_path / name
    shutil.copytree(quick.model, model)
    other = Quick.__new__(Quick)
    other.model = model
    out = other.planned(tmp_path / "run")
    assert other.run(out).returncode == 0
    assert {row["model"] for row in results(out)} == {name}
    said = {
        kind: subprocess.run(
            [sys.executable, "-P", "-m", "harness", "results", str(out), "--format", kind],
            capture_output=True, text=True, check=True,
        ).stdout
        for kind in ("markdown", "csv")
    }  # fmt: skip
    assert "<script>" not in said["markdown"]
    assert all(line.count(name) == line.count("'" + name) for line in said["csv"].splitlines())
    assert {path.parent for path in tmp_path.iterdir()} == {tmp_path}
    assert {path.name for path in tmp_path.iterdir()} == {name, "run"}
    figure(28, "a hostile folder name: escaped in Markdown and CSV, 0 files outside the run folder")


@pytest.mark.fault(28)
def test_28_a_plan_cannot_name_files_outside(quick: Quick, tmp_path: Path) -> None:
    out = quick.planned(tmp_path / "run")
    text = (out / "plan.json").read_text().replace("c" * 64, "../../../../etc/passwd")
    (out / "plan.json").write_text(text)
    done = quick.run(out)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    from harness.runfolder import RunFolder

    with pytest.raises(HarnessError, match="no SHA-256"):
        RunFolder(out).calibration("../../../../etc/passwd")
