"""Which model a name stands for."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import HarnessError, unknown
from harness.paths import cache_dir

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Preset:
    """A row of ``presets.toml``."""

    name: str
    summary: str
    hub: str | None = None
    revision: str | None = None
    wheel: str | None = None
    member: str | None = None
    wheel_sha256: str | None = None
    grid_group: int | None = (
        None  # the weights lie on a 4-bit grid of groups of this size: rounding there looks lossless
    )


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. ``path`` is its local folder, None until it is fetched."""

    name: str
    kind: Literal["wheel", "hub", "folder"]
    location: str
    revision: str | None
    path: Path | None
    preset: Preset | None = None


def model_presets() -> dict[str, Preset]:
    with (Path(__file__).parent / "presets.toml").open("rb") as stream:
        return {name: Preset(name, **row) for name, row in tomllib.load(stream).items()}


def wheel_folder(preset: Preset) -> Path:
    """Where :mod:`harness.fetch` puts the model of a wheel preset."""
    assert preset.wheel_sha256 is not None
    return cache_dir() / "models" / f"{preset.name}-{preset.wheel_sha256[:12]}"


def resolve_model(name: str) -> ModelSource:
    """A preset, a folder (``./x``, ``/x``) or a hub id (``org/name``, ``org/name@revision``).

    Raises HarnessError with the nearest presets for anything else.
    """
    presets = model_presets()
    if name in presets:
        return _from_preset(presets[name])
    if name.startswith(("/", "./", "../", "~")) or (name and _folder(name)):
        folder = _folder(name)
        if folder is None:
            raise HarnessError(f"model {name!r}: no such folder", fix="check the path")
        return ModelSource(folder.name, "folder", str(folder), None, folder)
    hub_id, _, revision = name.partition("@")
    if _HUB_ID.fullmatch(hub_id):
        return ModelSource(hub_id, "hub", hub_id, revision or None, _cached_snapshot(hub_id, revision or "main"))
    raise unknown("model", name, presets, listing="harness list models")


def _folder(name: str) -> Path | None:
    """The folder of that name, None where there is none or the name cannot be a path."""
    try:
        folder = Path(name).expanduser().resolve()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long; nobody's home; a zero byte
        return None


def _from_preset(preset: Preset) -> ModelSource:
    if preset.hub:
        path = _cached_snapshot(preset.hub, preset.revision or "main")
        return ModelSource(preset.name, "hub", preset.hub, preset.revision, path, preset)
    assert preset.wheel is not None
    folder = wheel_folder(preset)
    complete = (folder / "config.json").is_file()  # written last
    return ModelSource(preset.name, "wheel", preset.wheel, None, folder if complete else None, preset)


def _cached_snapshot(hub_id: str, revision: str) -> Path | None:
    """The snapshot folder in the hub's own cache, found without importing its library."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    root = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{hub_id.replace('/', '--')}"
    reference = root / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = root / "snapshots" / commit
    has_weights = snapshot.is_dir() and any(snapshot.glob("*.safetensors"))
    return snapshot if has_weights and (snapshot / "config.json").is_file() else None
