"""CBQ: train the rounding of a window of blocks, one block at a time or several together, window after window."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from harness.errors import BadOutput, HarnessError
from harness.method import QuantizedWindow, Report, StreamName, register
from harness.methods.cbq_cfp import Outliers
from harness.methods.cbq_objective import Errors, Objective, Text
from harness.methods.cbq_prepare import Preparation, Prepared, entering
from harness.methods.cbq_start import Start
from harness.methods.cbq_student import Student
from harness.settings import UNQUANTIZED, Setting
from harness.window import Window

Decay = Callable[[int], float]
"""From the number of a step to the fraction of its learning rate."""


@dataclass(frozen=True)
class Begun:
    """Where the training of a window may start."""

    name: str
    student: Student
    ships: QuantizedWindow
    """The student before it has learned anything."""
    errors: Errors
    described: Mapping[str, Report]
    """By linear, how it was prepared."""
    settled: Mapping[str, torch.Tensor]
    """What of the preparation the next window has to keep to."""


@register("cbq")
@dataclass(frozen=True)
class CBQ:
    """Learn rounding, scales and activation clipping of a window of blocks against two targets.

    Ding et al., "CBQ: Cross-Block Quantization for Large Language Models", ICLR 2025. The authors published no
    training code: where the paper is silent, there is an option.
    """

    size: int = 1
    """blocks in a window"""
    stride: int = 1
    """blocks by which the window moves on: those that leave are hardened"""
    init: Literal["rtn", "gptq"] = "gptq"
    """where the integers start: rounding to nearest, or GPTQ's solution of each layer"""
    damp: float = 0.01
    """init=gptq: λ, this fraction of the mean diagonal is added to the Hessian's diagonal"""
    rotate: Literal["none", "hadamard", "duquant"] = "none"
    """smooth and rotate all inputs first, by Hadamard blocks or as DuQuant does, in place of CFP's scaling"""
    cfp_activations: bool = True
    """coarse-to-fine pre-processing: where activations are quantized, scale the outlier channels of each input down"""
    cfp_weights: bool = False
    """coarse-to-fine pre-processing: cut off the outliers of each weight before its grid is found"""
    lambda1: float = 1.5
    """λ1: interquartile ranges above the third quartile where candidates for outliers begin"""
    lambda2: float = 1.0
    """λ2: the retained candidates' variance against the gap to the outliers"""
    quantile: float = 0.25
    """Q1 is this quantile, and Q3 its mirror image"""
    gap: Literal["squared", "absolute"] = "squared"
    """the distance between retained candidates and outliers; absolute depends on the unit of the values"""
    exponent: float = 0.5
    """an outlier channel is divided by (max|X_c| / t)^exponent"""
    max_truncated: float = 0.001
    """where more of a weight than this would be cut off there is no gap, and nothing is"""
    max_channels: float = 0.05
    """where more channels than this would be scaled there is no gap, and none is"""
    rounding: Literal["lora", "full", "none"] = "full"
    """V = V₀ + A₁A₂ of low rank; V itself; or V₀ kept: only scales and clipping are learned"""
    rank: int = 5
    """rounding=lora: r, columns of A₁"""
    residual: bool = True
    """V₀ is what rounding down leaves of the weight; false: 0, half-way between two levels"""
    relaxation: Literal["soft", "straight_through"] = "straight_through"
    """train with D(V) between 0 and 1, or with D(V) hardened and its slope on the way back"""
    fp_target: float = 1.0
    """weight of the error against the full-precision stream's outputs (error propagation)"""
    homologous_target: float = 0.0
    """weight of the error against the full-precision window's outputs for the quantized stream's inputs"""
    l2: float = 1.0
    """weight of the squared error"""
    l2_form: Literal["squared", "root"] = "squared"
    """the squared error of a token, or its root"""
    token_norm: float = 0.5
    """p: a token's squared error is divided by its target's mean square to the power p; 0: no token is scaled"""
    kl: float = 0.0
    """weight of KL(target ‖ student) between the softmax over a token's hidden units"""
    commitment: float = 30.0
    """γ: relaxation=soft: the pull of L_com on the blocks that leave the window, against that of the loss"""
    commits: Literal["leaving", "all"] = "leaving"
    """L_com pulls at the blocks that leave the window, or at all of it"""
    beta_start: float = 4.0
    """β of L_com after warm-up, from where it falls linearly"""
    beta_end: float = 1.0
    """β of L_com in the end"""
    warmup: float = 0.2
    """fraction of the steps without L_com"""
    epochs: int = 6
    """passes over the calibration text for each window"""
    batch: int = 1
    """sequences in a step"""
    rounding_lr: float = 0.03
    """learning rate of V, or of A₁ and A₂"""
    scale_lr: float = 0.02
    """learning rate of v at 2 bits, where a scale is 2σ(v) of what it was; half of it for each bit more"""
    clip_lr: float = 0.08
    """learning rate of ρ at 2 bits, where 2σ(ρ) of each token's range is kept; half of it for each bit more"""
    holdout: int = 2
    """sequences that are not trained on"""
    guard: bool = True
    """a window that is no better than its initialization on the sequences held out keeps it"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the products of matrices in training; auto: bfloat16 where the machine multiplies it faster"""

    workspace: ClassVar[dict[str, Any]] = {"weights": 8.0, "squares": 6.0, "streams": 3}
    expected_failures: ClassVar[Mapping[str, str]] = {
        "order_independent": "Adam takes the sequences one after another, and the last ones are held out",
    }

    @property
    def reads(self) -> frozenset[StreamName]:
        return frozenset({"full_precision", "quantized"})

    def supports(self, setting: Setting) -> str | None:
        if setting.weight_bits == UNQUANTIZED:
            return "cbq quantizes weights: choose W2 to W8"
        if not 1 <= self.stride <= self.size:
            return "windows leave no block out: stride from 1 to size"
        if self.holdout < 1:
            return "windows are judged by text that they were not trained on: holdout=1 or more"
        if self.epochs < 1 or self.batch < 1:
            return "a window is trained on steps of one sequence or more: epochs=1 and batch=1, or more"
        if not (self.l2 or self.kl) or not (self.fp_target or self.homologous_target):
            return "there is nothing to train against: l2 or kl, of fp_target or homologous_target, above 0"
        return None

    def quantize(self, window: Window, setting: Setting) -> QuantizedWindow:
        start = time.monotonic()
        text = Text.of(window, homologous=bool(self.homologous_target))
        if len(text) <= self.holdout:
            raise HarnessError(
                f"{len(text)} calibration sequences, of which {self.holdout} are held out, leave none to train on",
                fix="calibrate on more sequences, or lower holdout",
            )
        trained, held = text.part(0, len(text) - self.holdout), text.part(len(text) - self.holdout, len(text))
        begun = self.begin(window, held, setting)
        student, before = begun.student, begun.ships
        with window.runner.installed(student.differentiable, ()):
            facts: Report = {"window": window.index, **self.train(window, student, trained)}
        after = student.hardened()
        errors = self.errors(window, held, after)
        learned = not self.guard or errors.better_than(begun.errors)
        window.progress(
            f"{window.blocks[-1].name}: loss soft {facts['loss']:.4f}, hard {errors.loss:.4f} on unseen text "
            f"(before {begun.errors.loss:.4f}), {student.undecided():.0%} undecided"
        )
        facts |= begun.errors.report("_before") | errors.report() | {"kept_initialization": not learned}
        facts["seconds"] = (time.monotonic() - start) / len(window.linears)
        rows = [
            {"layer": name, **begun.described[name], **student.described(name, linear), **facts}
            for name, linear in before.linears.items()
        ]
        # What a window before has learned was better than its start and is handed on even if this one learned nothing.
        staying = {name: value for name, value in window.carried.items() if name.partition("|")[0] in window.staying}
        state = {**student.state(window.staying), **begun.settled} if learned else staying
        return replace(after if learned else before, report=tuple(rows), state=state)

    def begin(self, window: Window, held: Text, setting: Setting) -> Begun:
        """GPTQ's or rounded integers of the plain weights or, where CFP has something to prepare and that answers
        ``held`` better, of those that it has prepared.

        They are those of all of the text: training, which has not seen what is held out, has to be better than the best
        that would ship without it. (Under ``rotate`` there is nothing that CFP could choose.)
        """
        cfp = self.preprocessed(window, setting)
        begun = None if cfp is None else self.begun("cfp", cfp, window, held, setting)
        if begun is not None and not self.guard:
            return begun
        plain = Preparation(None, None, self.exponent, self.rotate).of(window)
        plainly = self.begun("plain", plain, window, held, setting)
        return begun if begun is not None and begun.errors.better_than(plainly.errors) else plainly

    def preprocessed(self, window: Window, setting: Setting) -> Prepared | None:
        """The window with outliers scaled down and cut off, None where CFP finds none that could be."""
        scales = self.cfp_activations and setting.quantizes_activations and self.rotate == "none"
        channels = self.outliers(self.max_channels) if scales else None
        weights = self.outliers(self.max_truncated) if self.cfp_weights else None
        if channels is None and weights is None:
            return None
        prepared = Preparation(channels, weights, self.exponent, self.rotate).of(window)
        return prepared if prepared.changes(entering(window)) else None

    def begun(self, name: str, prepared: Prepared, window: Window, held: Text, setting: Setting) -> Begun:
        """The window as ``init`` quantizes it."""
        window.progress(f"{window.blocks[-1].name}: {self.init}, {name}")
        start = Start(self.rounding, self.rank, self.residual, self.damp)
        quantize = start.solved if self.init == "gptq" else start.rounded
        student = quantize(window, prepared, setting)
        ships = student.hardened()
        described = {linear: prepared.described(linear) for linear in window.linears}
        described |= {linear: {"start": name, **described[linear]} for linear in entering(window)}
        return Begun(name, student, ships, self.errors(window, held, ships), described, prepared.state(window.staying))

    def outliers(self, max_fraction: float) -> Outliers:
        """How outliers are told from the rest, where more than ``max_fraction`` cannot be any."""
        return Outliers(self.lambda1, self.lambda2, self.quantile, self.gap, max_fraction)

    def errors(self, window: Window, text: Text, part: QuantizedWindow) -> Errors:
        """Of the window on ``text``, run as it would ship."""
        return self.objective.errors(text, lambda inputs: window.forward(inputs, part))

    def train(self, window: Window, student: Student, text: Text) -> dict[str, float]:
        """Adam on everything that is learned of the window; learning rates fall to 0 along a cosine, but not that of
        soft rounding, which commits itself in the last steps."""
        steps = self.epochs * math.ceil(len(text) / self.batch)
        cosine: Decay = lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))  # noqa: E731
        rounding, scales, clips = student.parameters()
        bits = student.setting
        learned: list[tuple[list[nn.Parameter], float, Decay]] = [
            (rounding, self.rounding_lr, cosine if self.relaxation == "straight_through" else lambda _: 1.0),
            # What stretches a grid moves its outermost level by 2^(bits − 1) steps at once.
            (scales, self.scale_lr * 2.0 ** (2 - bits.weight_bits), cosine),
            (clips, self.clip_lr * 2.0 ** (2 - bits.activation_bits), cosine),
        ]
        learned = [(parameters, lr, decay) for parameters, lr, decay in learned if parameters]
        groups = [{"params": parameters, "lr": lr} for parameters, lr, _ in learned]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [decay for _, _, decay in learned])
        committed = window.leaving if self.commits == "leaving" else window.blocks
        pulled = student.of(name for block in committed for name in block.linears)
        modules, objective = student.modules(self.relaxation), self.objective
        losses: dict[str, float] = {}
        each, undecided = max(1, steps // 10), 1.0
        for step, indices in enumerate(self.batches(len(text))):
            example = text.batch(indices)
            with torch.enable_grad():
                with self.mixed_precision(example.inputs):
                    outputs = window.forward_through(example.inputs, modules)
                terms = {name: t.mean() for name, t in objective(example, outputs, text.mean_square).items()}
                # In float16 the gradient of a mean would be lost below the smallest number. Adam sees no common factor.
                (terms["loss"] * (outputs.numel() if outputs.dtype == torch.float16 else 1)).backward()
            if beta := self.beta(step / steps):
                for weight in pulled:
                    weight.commit(beta, self.commitment)
            optimizer.step()
            student.constrain()
            optimizer.zero_grad()
            schedule.step()
            losses = _smoothed(losses, terms)
            if step % each == 0:
                undecided = student.undecided()
            window.progress(
                f"{window.blocks[-1].name}: step {step + 1} of {steps}, loss {losses['loss']:.4f}, "
                f"{undecided:.0%} undecided"
            )
        diverged = student.diverged()
        if diverged or not all(math.isfinite(value) for value in losses.values()):
            where = ", ".join(diverged) or None
            raise BadOutput("training diverged", where=where, fix="lower rounding_lr, scale_lr and clip_lr")
        return losses

    def batches(self, sequences: int) -> Iterator[list[int]]:
        """Every sequence once an epoch, in an order of its own."""
        for _ in range(self.epochs):
            yield from (part.tolist() for part in torch.randperm(sequences).split(self.batch))

    def beta(self, done: float) -> float | None:
        """β of L_com when the fraction ``done`` of the steps is, None where L_com is not used."""
        if self.relaxation != "soft" or not self.commitment or done < self.warmup:
            return None
        return self.beta_start + (self.beta_end - self.beta_start) * (done - self.warmup) / (1 - self.warmup)

    @property
    def objective(self) -> Objective:
        return Objective(self.fp_target, self.homologous_target, self.l2, self.kl, self.token_norm, self.l2_form)

    def mixed_precision(self, inputs: torch.Tensor) -> torch.autocast:
        """bfloat16 products of a float32 model where asked for or, with ``auto``, where they are the faster ones."""
        device = inputs.device
        wanted = self.precision == "bfloat16" or (self.precision == "auto" and multiplies_bfloat16_faster(device))
        return torch.autocast(device.type, torch.bfloat16, enabled=wanted and inputs.dtype == torch.float32)


def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Whether there are matrix units for it: AMX tiles, or a GPU's."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def _smoothed(losses: Mapping[str, float], terms: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Running means over some ten steps."""
    return {
        name: losses.get(name, float(value.detach())) * 0.9 + 0.1 * float(value.detach())
        for name, value in terms.items()
    }
