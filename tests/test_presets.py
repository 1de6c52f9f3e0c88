from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.presets import model_presets, resolve_model


def test_every_preset_has_one_source() -> None:
    for preset in model_presets().values():
        assert (preset.hub is None) != (preset.wheel is None), preset.name
        assert preset.wheel is None or (preset.member and preset.wheel_sha256)


def test_folder_hub_id_and_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert resolve_model(str(tmp_path)).path == tmp_path
    hub = resolve_model("org/name@abc")
    assert (hub.kind, hub.location, hub.revision, hub.path) == ("hub", "org/name", "abc", None)
    assert resolve_model("llama2-7b").location == "meta-llama/Llama-2-7b-hf"
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    assert resolve_model("org/name@abc").path == snapshot


@pytest.mark.parametrize("name", ["lama2-7b", "./nowhere", "a b", "../../etc/passwd", ""])
def test_anything_else_is_an_error_with_a_fix(name: str) -> None:
    with pytest.raises(HarnessError, match="fix:"):
        resolve_model(name)
