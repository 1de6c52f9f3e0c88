import pytest

from harness.errors import HarnessError
from harness.settings import FULL_PRECISION, Setting


@pytest.mark.parametrize(
    "text", ["W4A4", "W4A8", "W2A16", "W4A16g128", "W2A16g64", "W4A4KV4", "W8A8sym", "W3A16g32sym", "W16A16"]
)
def test_round_trip(text: str) -> None:
    assert str(Setting.parse(text)) == text


def test_parts() -> None:
    assert Setting.parse("W4A8KV4g64sym") == Setting(4, 8, 4, 64, True)
    assert Setting.parse("W16A16") == FULL_PRECISION


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("W5A3", "choose from 2, 3, 4, 8, 16"),
        ("W4A3", "choose from 4, 8, 16"),
        ("W4A4KV2", "choose from 4, 8, 16"),
        ("W4", "W<bits>A<bits>"),
        ("w4a4", "W<bits>A<bits>"),
        ("W4A4g0", "leave g out"),
        ("W16A16g64", "leave the g part out"),
        ("W4A4;rm -rf", "W<bits>A<bits>"),
        ("", "W<bits>A<bits>"),
    ],
)
def test_bad_settings_say_what_is_legal(text: str, hint: str) -> None:
    with pytest.raises(HarnessError) as error:
        Setting.parse(text)
    assert hint in str(error.value)
