"""Planted cheats and bugs: each is caught by the check that is there for it, and told for what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness import simulation
from harness.conformance.models import tiny_cases
from harness.conformance.subject import Subject
from harness.conformance.suite import CHECKS, Outcome, examine, unexpected_passes
from harness.driver import quantize_model
from harness.errors import BadOutput
from harness.models import LoadedModel
from harness.progress import silent
from harness.registry import create_method, method_class
from harness.settings import Setting

BROKEN = Path(__file__).parents[1] / "broken_methods"
PLANTED = [
    ("returns_full_precision", "codes_within_bits", "is a FullPrecision, not a QuantizedLinear"),
    ("five_bits", "codes_within_bits", "5-bit codes at W4A8g16"),
    ("five_bits", "settings_kept", "5-bit codes"),
    ("codes_beyond_bits", "codes_within_bits", "beyond 4 bits"),
    ("one_weight_groups", "honest_bits", "groups of 1"),
    ("weight_in_rotation", "honest_bits", "not orthogonal"),
    ("adds_a_bias", "honest_bits", "a bias, which the layer has none of"),
    ("changes_calibration", "leaves_calibration_alone", "chunk 0 of the quantized stream changed"),
    ("changes_model", "leaves_the_model_alone", "model.layers.0.mlp.down_proj.weight changed in window 0"),
    ("changes_the_embedding", "leaves_the_model_alone", "model.embed_tokens.weight changed over the whole walk"),
    ("leaks_random_state", "leaves_the_process_alone", "Python's random"),
    ("leaks_random_state", "leaves_the_process_alone", "the seed of torch's generator"),
    ("switches_precision", "leaves_the_process_alone", "environment variable BEHIND is new"),
    ("reads_one_batch", "order_independent", "change with the order"),
    ("skips_a_layer", "every_layer_quantized", "mlp.down_proj"),
    ("omits_a_layer", "codes_within_bits", "mlp.down_proj was not quantized"),
    ("returns_nan", "codes_within_bits", "not a finite positive number"),
    ("wrong_shape", "codes_within_bits", "has codes of shape"),
    ("remembers", "deterministic", "a second run gives other integers"),
    ("changes_the_function", "function_preserved", "this is not rounding"),
    ("hides_nan", "nan_is_refused", "as if nothing had happened"),
    ("hands_on_full_precision", "resumes", "resumed"),
    ("ignores_groups", "unsupported_refused", "groups of 13 divide no layer"),
    ("forgets_activations", "settings_kept", "activations None"),
    ("raises", "codes_within_bits", "ValueError: broken on purpose"),
    ("supports_nothing", "settings_answered", "no setting is supported"),
    ("keeps_keys", "settings_kept", "keys and values ActivationSpec(bits=8"),
    ("stretches_queries", "settings_kept", "a rotation of queries and keys that is not orthogonal"),
    ("tunes_norms", "function_preserved", "this is not rounding"),
    ("remembers_the_text", "leaves_the_process_alone", "remembers_the_text.SEEN changed"),
    ("hands_on_by_module", "leaves_the_process_alone", "hands_on_by_module.LEARNED changed"),
    ("patches_the_quantizer", "leaves_the_process_alone", "harness.simulation.simulate_tokens changed"),
    ("averages_maxima", "order_independent", "change with the order"),
    ("wastes_a_bit", "more_bits_are_better", "with plain rounding by"),
    ("divides_by_dead_channels", "hard_weights", "not a finite positive number"),
]


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    """Some of these methods do what they are caught at."""
    import os

    dtype, environment, tokens = torch.get_default_dtype(), dict(os.environ), simulation.simulate_tokens
    yield
    torch.set_default_dtype(dtype)
    simulation.simulate_tokens = tokens
    os.environ.clear()
    os.environ.update(environment)


def outcome(method: str, check: str) -> Outcome:
    info, create = method_class(method)
    case = next(iter(tiny_cases().values()))
    return examine(Subject(info, create, case), next(c for c in CHECKS if c.name == check))


@pytest.mark.fault(22, 23)
@pytest.mark.parametrize(("method", "check", "words"), PLANTED)
def test_what_is_planted_is_found_and_named(method: str, check: str, words: str) -> None:
    found = outcome(str(BROKEN / f"{method}.py"), check)
    assert found.state == "failed"
    assert words in found.message


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_plain_rounding_passes(check: str) -> None:
    assert outcome("rtn", check).state in ("passed", "not applicable")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_says_what_it_is_for_and_how_to_pass(check) -> None:
    assert len(check.purpose) > 20 and len(check.how_to_pass) > 5
    assert not check.how_to_pass.startswith("To pass")


def test_the_driver_refuses_what_is_no_integers() -> None:
    info, create = method_class(str(BROKEN / "returns_full_precision.py"))
    with pytest.raises(BadOutput, match="not a QuantizedLinear"):
        Subject(info, create, next(iter(tiny_cases().values()))).run()


def test_what_behaves_only_where_it_is_watched_is_refused_where_it_does_not(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """The suite cannot know what a method does elsewhere: every cell is held against its setting as well."""
    assert outcome(str(BROKEN / "behaves_when_watched.py"), "settings_kept").state == "passed"
    method = create_method(str(BROKEN / "behaves_when_watched.py"), {})
    with pytest.raises(BadOutput, match=r"q_proj has 8-bit codes at W4A16g16"):
        quantize_model(
            tiny_model, method, Setting.parse("W4A16g16"), None, seed=0, checkpoints=tmp_path, progress=silent
        )


def test_an_expected_failure_that_passes_is_told() -> None:
    passed = [Outcome("resumes", model, "passed", "", 0.0) for model in ("a", "b")]
    assert list(unexpected_passes(passed, {"resumes": "it forgets"})) == ["resumes"]
    failed = [*passed, Outcome("resumes", "c", "expected", "it forgets", 0.0)]
    assert list(unexpected_passes(failed, {"resumes": "it forgets"})) == []
