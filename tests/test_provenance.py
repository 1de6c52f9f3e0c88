"""What is recorded of the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from harness import doctor, provenance


def test_capture_is_json_and_names_versions() -> None:
    found = json.loads(json.dumps(provenance.capture(threads=3), allow_nan=False))
    assert found["threads"] == 3
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"]
    assert found["memory_bytes"] > 10**8


def test_no_gpu_or_a_torch_without_cuda_means_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "gpus", lambda: ("A GPU, 1.0, 80 GB",))
    monkeypatch.setattr(provenance, "version", lambda _: "2.9.0+cpu")
    assert provenance.default_device() == "cpu"
    monkeypatch.setattr(provenance, "version", lambda _: "2.9.0")
    assert provenance.default_device() == "cuda"
    monkeypatch.setattr(provenance, "gpus", tuple)
    assert provenance.default_device() == "cpu"


def test_doctor_finds_a_missing_data_root_and_the_datasets_in_one(tmp_path: Path) -> None:
    def findings(root: Path | None) -> dict[str, doctor.Finding]:
        return {finding.what: finding for finding in doctor._data(root)}

    assert findings(None)["data root"].state == "missing"
    assert findings(tmp_path / "none")["data root"].state == "bad"
    folder = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    (folder.parent / "README.md").touch()
    (folder / "test-00000-of-00001.parquet").touch()
    found = findings(tmp_path)
    assert "Salesforce/wikitext" in found["data root"].detail
    assert (found["corpus wikitext2"].state, found["corpus wikitext2"].detail) == ("good", "test")
    assert found["corpus c4"].state == "missing"
