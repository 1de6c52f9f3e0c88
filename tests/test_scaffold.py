"""``harness methods new``, and how other packages' methods are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import HarnessError, Problems
from harness.listing import rows
from harness.registry import create_method, describe_methods, find_method
from harness.scaffold import write_method
from harness.settings import Setting


def test_only_the_file_works_at_once(tmp_path: Path) -> None:
    (file,) = write_method("my_method", tmp_path, only_file=True)
    method = create_method(str(file), {"clip": 0.9})
    assert method.supports(Setting.parse("W4A8")) is None
    with pytest.raises(Problems, match="there already"):
        write_method("my_method", tmp_path, only_file=True)


@pytest.mark.parametrize("name", ["My", "9a", "a-b", "rtn", "fp"])
def test_bad_and_taken_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HarnessError):
        write_method(name, tmp_path, only_file=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package, where Python finds installed ones, without pip: its source and what pip would record."""
    package = write_method("my_method", tmp_path, only_file=False)[0].parent
    about = package / "src" / "harness_my_method-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: harness-my-method\nVersion: 0.1.0\n")
    points = "[harness.methods]\nmy_method = harness_my_method.method:MyMethod\n"
    (about / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(package / "src"))
    monkeypatch.setenv("PYTHONPATH", str(package / "src"))
    return package


def test_an_installed_method_is_found_by_its_entry_point(installed: Path) -> None:
    info = describe_methods()["my_method"]
    assert [option.name for option in info.options] == ["clip"]
    before = sys.modules.keys() & {"harness_my_method", "harness_my_method.method"}
    assert not before  # it was read, not run
    method = create_method("my_method", {})
    assert type(method).__module__ == "harness_my_method.method"
    for name in ("harness_my_method", "harness_my_method.method"):
        del sys.modules[name]


def test_a_neighbour_in_its_package_is_part_of_its_identity(installed: Path) -> None:
    before = find_method("my_method", describe_methods()).sha256
    (installed / "src" / "harness_my_method" / "helper.py").write_text("x = 1\n")
    assert find_method("my_method", describe_methods()).sha256 != before


def test_one_that_cannot_be_imported_is_listed_with_its_traceback(installed: Path) -> None:
    file = installed / "src" / "harness_my_method" / "method.py"
    file.write_text(file.read_text().replace("from typing", "import no_such_module\nfrom typing"))
    row = next(row for row in rows("methods") if row[0] == "my_method")
    assert row[1].startswith("BROKEN: Traceback")
    assert "No module named 'no_such_module'" in row[1]


def test_an_entry_point_to_nothing_is_listed_as_broken(installed: Path) -> None:
    (installed / "src" / "harness_my_method" / "method.py").unlink()
    assert "which there is not" in str(describe_methods()["my_method"].broken)


def test_a_taken_name_does_not_hide_the_built_in(installed: Path) -> None:
    file = installed / "src" / "harness_my_method" / "method.py"
    file.write_text(file.read_text().replace('"my_method"', '"rtn"'))
    infos = describe_methods()
    assert infos["rtn"].module == "harness.methods.rtn"
    assert "taken" in str(infos["rtn of harness_my_method.method"].broken)


def test_harness_methods_narrows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_METHODS", "rtn")
    assert list(describe_methods()) == ["fp", "rtn"]
    monkeypatch.setenv("HARNESS_METHODS", "rtm")
    with pytest.raises(HarnessError, match="did you mean 'rtn'"):
        describe_methods()


def test_the_package_builds(tmp_path: Path) -> None:
    package = write_method("my_method", tmp_path, only_file=False)[0].parent
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*words, "--wheel-dir", str(tmp_path), str(package)], check=True)
    assert list(tmp_path.glob("harness_my_method-0.1.0-*.whl"))
