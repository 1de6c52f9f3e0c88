import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.registry import create_method, describe_methods, find_method
from harness.settings import Setting

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar, Literal
from harness.method import register

@register("mine")
@dataclass(frozen=True)
class Mine:
    """Does nothing,
    politely.

    More text.
    """
    strength: float = 0.5
    """how much"""
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    size: ClassVar[int] = 1
    stride: ClassVar[int] = 1
    reads: ClassVar[frozenset[str]] = frozenset()
    def supports(self, setting): return "too few bits" if setting.weight_bits < 4 else None
    def quantize(self, window, setting): raise AssertionError
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def test_method_is_described_from_its_source(plugin: Path) -> None:
    info = describe_methods([str(plugin)])["mine"]
    assert info.summary == "Does nothing, politely."
    assert [(o.name, o.kind, o.default, o.choices, o.optional, o.help) for o in info.options] == [
        ("strength", "a number", 0.5, (), False, "how much"),
        ("kind", "a word", "a", ("a", "b"), False, ""),
        ("maybe", "an integer", None, (), True, ""),
    ]


def test_described_options_are_those_of_the_class(plugin: Path) -> None:
    method = create_method(str(plugin), {"strength": 2.0, "kind": "b"})
    assert (method.strength, method.kind, method.maybe) == (2.0, "b", None)  # type: ignore[attr-defined]
    assert method.supports(Setting.parse("W2A16")) == "too few bits"
    assert method.supports(Setting.parse("W4A16")) is None


def test_identity_changes_with_the_source(plugin: Path) -> None:
    before = find_method(str(plugin), {}).sha256
    plugin.write_text(PLUGIN + "# changed\n")
    assert find_method(str(plugin), {}).sha256 != before


def test_identity_includes_the_methods_it_builds_on(plugin: Path) -> None:
    alone = find_method(str(plugin), {}).sha256
    plugin.write_text("from harness.methods.rtn import RTN\n" + PLUGIN)
    upon = find_method(str(plugin), {}).sha256
    plugin.write_text("# rom harness.methods.rtn import RTN\n" + PLUGIN)
    assert len({alone, upon, find_method(str(plugin), {}).sha256}) == 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("strength: float = 0.5", "strength: float"), "strength has no default"),
        (("0.5", "compute()"), "default of strength is not a literal"),
        (("float", "list[int]"), "strength is not a bool, int, float, str or Literal"),
        (("class Mine", "class Mi ne"), "mine.py:8"),
    ],
)
def test_broken_files_are_listed_with_their_line(plugin: Path, change: tuple[str, str], complaint: str) -> None:
    plugin.write_text(PLUGIN.replace(*change))
    broken = [info.broken for info in describe_methods([str(plugin)]).values() if info.broken]
    assert len(broken) == 1 and complaint in broken[0] and "mine.py:" in broken[0]
    with pytest.raises(HarnessError, match="is broken"):
        find_method(str(plugin), {})


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"did you mean 'rtn'\?"):
        find_method("rtm", describe_methods())
    with pytest.raises(HarnessError, match="does not exist"):
        find_method(str(tmp_path / "none.py"), {})


def test_describing_runs_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.py"
    bomb.write_text("raise SystemExit(3)\n" + PLUGIN)
    code = (
        "import sys; from harness.registry import describe_methods; "
        f"assert {{'fp', 'rtn', 'mine'}} <= set(describe_methods([{str(bomb)!r}])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
