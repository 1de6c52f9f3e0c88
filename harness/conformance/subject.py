"""A method on one model: the runs that several checks look at are done once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int64

from harness.conformance.models import Case
from harness.conformance.watching import Traces, Watched, changes, model_state
from harness.driver import quantize_model
from harness.method import Method
from harness.models import LoadedModel
from harness.quantized import QuantizedModel
from harness.registry import MethodInfo
from harness.settings import Setting

# The first of these that the method supports is what most checks run at: it exercises the most.
_PREFERRED = ("W4A8g16", "W4A16g16", "W4A8", "W4A16", "W4A4", "W8A8", "W3A16", "W2A16g16", "W2A16")
_PARTS = ("codes", "scales", "zeros")


class Failed(Exception):
    """A method does not pass a check; the message says what was found."""


class NotApplicable(Exception):
    """A check has nothing to look at in this method; the message says why."""


@dataclass(frozen=True)
class Run:
    """A walk over a model: what came out, what it left changed, what it cost."""

    quantized: QuantizedModel
    traces: Traces
    progress: list[tuple[int, int, str]]
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What a check is given."""

    info: MethodInfo
    create: Callable[[], Method]
    case: Case
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list, init=False)
    """What any run left changed in the process: what is kept from the first one on changes only there."""
    _runs: dict[Setting, Run] = field(default_factory=dict, init=False)

    @cached_property
    def method(self) -> Method:
        return self.create()

    @cached_property
    def setting(self) -> Setting:
        return self.first_supported(*_PREFERRED)

    def first_supported(self, *settings: str) -> Setting:
        for text in settings:
            if self.method.supports(Setting.parse(text)) is None:
                return Setting.parse(text)
        raise NotApplicable(f"the method supports none of {', '.join(settings)}")

    @cached_property
    def model(self) -> LoadedModel:
        """One that no check changes."""
        return self.case.build()

    @cached_property
    def calibration(self) -> Int64[torch.Tensor, "n length"]:
        return self.case.calibration(self.case.short)

    @property
    def base(self) -> Run:
        """What most checks look at."""
        return self.at(self.setting)

    def at(self, setting: Setting) -> Run:
        """A plain run, done once however many checks look at it."""
        if setting not in self._runs:
            self._runs[setting] = self.run(setting)
        return self._runs[setting]

    def run(
        self,
        setting: Setting | None = None,
        *,
        model: LoadedModel | None = None,
        calibration: Int64[torch.Tensor, "n length"] | None = None,
        checkpoints: Path | None = None,
        stop_at: int | None = None,
    ) -> Run:
        """Quantize the model with a fresh instance of the method. Raises what the method raises."""
        said: list[tuple[int, int, str]] = []

        def progress(stage: str, done: int, total: int, detail: str = "") -> None:
            said.append((done, total, detail))

        watched = Watched(self.create(), stop_at=stop_at)
        model = model or self.model
        _ = model.architecture  # discovery looks at the model too, before the method does
        before = model_state(model.module)
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            quantized = quantize_model(
                model,
                watched,
                setting or self.setting,
                self.calibration if calibration is None else calibration,
                seed=0,
                checkpoints=checkpoints or Path(folder),
                progress=progress,
            )
            seconds = time.monotonic() - start
        self.left.extend(watched.traces.process)
        watched.traces.model += [
            f"{change} over the whole walk" for change in changes(before, model_state(model.module))
        ]
        return Run(quantized, watched.traces, said, seconds)

    def logits(self, quantized: QuantizedModel | None = None) -> Float[torch.Tensor, "tokens vocabulary"]:
        """Of a little text, by the model as it is or with ``quantized`` in it."""
        model = self.case.build() if quantized else self.model
        if quantized is not None:
            quantized.install(model.module, model.architecture)
        with torch.no_grad():
            logits: torch.Tensor = model.module(input_ids=self.calibration[:2, :64]).logits
        return logits.flatten(0, 1)

    def error(self, quantized: QuantizedModel) -> float:
        """‖logits − full-precision logits‖ / ‖full-precision logits‖."""
        plain = self.logits()
        return float((self.logits(quantized) - plain).norm() / plain.norm())


def differences(one: QuantizedModel, other: QuantizedModel) -> dict[str, float]:
    """The layers whose integers are not bit-equal, with the share of codes that differ."""
    found = {}
    for name, linear in one.linears.items():
        if any(not torch.equal(getattr(linear, part), getattr(other.linears[name], part)) for part in _PARTS):
            found[name] = float((linear.codes != other.linears[name].codes).float().mean())
    return found
