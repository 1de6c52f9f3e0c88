"""The four folders at the top import as parts of `harness`, installed or not, and collide with nobody's."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("methods", "kernels", "tasks", "reports")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_linked_and_has_no_init(name: str) -> None:
    assert os.readlink(ROOT / "harness" / name) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.fault(38)
def test_somebody_elses_kernels_package_wins(tmp_path: Path) -> None:
    """Repository root first on the path, as `python -m` puts it: transformers looks for a package `kernels`."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'site'")
    code = "import kernels, harness.kernels; assert kernels.owner == 'site'"
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_runs_from_anywhere(folder: Path) -> None:
    words = [sys.executable, "-m", "harness", "list", "methods"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert "rtn" in done.stdout


def test_wheel_holds_every_file_of_the_tree(tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    for name in ("harness", *FOLDERS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=LEFT_OUT)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
    subprocess.run(words, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("harness/")}
    ours = {
        str(Path("harness") / path.relative_to(copy / "harness"))
        for top in ("harness", *(f"harness/{name}" for name in FOLDERS))
        for path in (copy / top).rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    assert ours <= packed
    assert {"harness/methods/rtn.py", "harness/presets.toml", "harness/tasks/perplexity.py"} <= packed
