import contextlib
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError, Problems, unknown
from harness.specs import Spec, bind, canonical, options_of


@dataclass(frozen=True)
class Example:
    act_order: bool = True
    damp: float = 0.01
    block: int = 128
    kind: Literal["lora", "full"] = "lora"
    cap: int | None = None


OPTIONS = options_of(Example)


def test_options_are_converted_and_defaults_left_out() -> None:
    spec = Spec.parse("gptq:act_order=false:damp=0.05:block=128:cap=7")
    values = bind(OPTIONS, spec)
    assert values == {"act_order": False, "damp": 0.05, "cap": 7}
    assert Example(**values).cap == 7  # type: ignore[arg-type]
    assert canonical("gptq", values) == "gptq:act_order=false:cap=7:damp=0.05"


def test_canonical_text_reads_back() -> None:
    values = bind(OPTIONS, Spec.parse("x:kind=full:cap=3:act_order=no"))
    assert bind(OPTIONS, Spec.parse(canonical("x", values))) == values


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x:damp", "is not key=value"),
        ("x:=3", "is not key=value"),
        ("x:damp=1:damp=2", "given twice"),
        ("x:dmp=1", "unknown option 'dmp'[\\s\\S]*takes act_order, damp"),
        ("x:damp=lots", "is not a number"),
        ("x:block=1.5", "is not an integer"),
        ("x:act_order=maybe", "is not a boolean"),
        ("x:kind=half", "choose from lora, full"),
    ],
)
def test_mistakes_name_what_is_legal(text: str, complaint: str) -> None:
    with pytest.raises(HarnessError, match=complaint):
        bind(OPTIONS, Spec.parse(text))


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(HarnessError):
        assert set(bind(OPTIONS, Spec.parse(text))) <= {option.name for option in OPTIONS}


def test_a_field_that_cannot_be_an_option_is_told() -> None:
    @dataclass(frozen=True)
    class Bad:
        x: list[int] | None = None

    with pytest.raises(HarnessError, match=r"Bad\.x cannot be an option"):
        options_of(Bad)


def test_errors_tell_what_where_and_how_to_fix() -> None:
    error = HarnessError("it broke", where="here", fix="mend it")
    assert str(error).splitlines() == ["it broke", "  where: here", "  fix:   mend it"]
    both = str(Problems([error, unknown("model", "lama", ["llama", "opt"], listing="harness list models")]))
    assert both.startswith("2 problems, nothing was run:") and "did you mean 'llama'?" in both and "mend it" in both
