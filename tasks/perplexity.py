"""Token perplexity, and divergence from the full-precision model, from one pass over windows of a corpus.

The GPTQ protocol: the whole evaluation text is tokenized once, cut into windows that do not overlap, the tail is
dropped, and every token of a window but its first is predicted from those before it in the window.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from harness.corpora import corpus_named, evaluation_text, text_sha256
from harness.diagnose import first_not_finite
from harness.errors import BadOutput, HarnessError
from harness.models import LoadedModel, tokenizer_sha256
from harness.progress import Progress
from harness.tasks.catalogue import TaskSpec
from harness.tasks.measurement import Measurement, TaskResult

POSITIONS_AT_ONCE = 128  # of the output head: keeps float32 logits at 25 MB for 49,152 tokens
_PROBE_TOKENS = 16

_RULES = {
    "window_rule": "whole text tokenized once; windows do not overlap; tail dropped",
    "predicted": "every token of a window but its first, from those before it in the window",
    "stderr": "over windows (perplexity: by the delta method)",
}

Vector = npt.NDArray[np.float64]
Logits = Callable[[int, int], Float[torch.Tensor, "positions vocabulary"]]


@dataclass(frozen=True)
class EvaluationWindows:
    """Token ids [windows, length] of a corpus's evaluation split, and how they came about."""

    ids: Int[torch.Tensor, "windows length"]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """The model that the first ``windows`` windows (None: all) are compared with."""

    model: LoadedModel
    windows: int | None = None


@dataclass(frozen=True)
class WindowScores:
    """Sums over the predicted tokens of each window."""

    nll: Vector
    divergence: tuple[Vector, Vector] | None
    """KL divergence and top-1 agreements; None without a reference."""
    head: str


def measure_windows(
    specs: Sequence[TaskSpec],
    model: LoadedModel,
    reference: Callable[[], LoadedModel] | None,
    data_root: Path | None,
    progress: Progress,
) -> list[TaskResult]:
    """Results of perplexity and KL tasks of one corpus and one length, all from the same forward passes.

    ``reference`` is called only if a KL task is there; None: the model is its own reference. Raises HarnessError if
    the corpus is missing or has fewer windows than asked, BadOutput for a window whose numbers are not finite.
    """
    corpus, length = specs[0].corpus, specs[0].count("length") or 0
    windows = evaluation_windows(corpus, length, _most(specs), model, data_root)
    divergence = [spec for spec in specs if spec.kind == "kl"]
    against = None
    if divergence:
        against = Reference(model if reference is None else reference(), _most(divergence))
    started = time.monotonic()
    scores = score_windows(model, windows.ids, against, lambda done, of: progress(corpus, done, of))
    hashes = _hashes(windows.ids)
    seconds = (time.monotonic() - started) / len(specs)
    manifest = windows.manifest | {"head": scores.head, "vocabulary": model.module.config.get_text_config().vocab_size}
    return [_result(spec, scores, hashes, manifest, seconds) for spec in specs]


def _most(specs: Sequence[TaskSpec]) -> int | None:
    """The most windows that any of the tasks asks for; None: all."""
    counts = [spec.count("windows") for spec in specs]
    return None if None in counts else max(count or 0 for count in counts)


def evaluation_windows(
    name: str, length: int, count: int | None, model: LoadedModel, data_root: Path | None
) -> EvaluationWindows:
    """The first ``count`` windows (None: all). Raises HarnessError for too few, or longer ones than the model takes."""
    positions = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise HarnessError(
            f"{model.name} takes at most {positions} tokens, {name} is asked for in windows of {length}",
            fix=f"{name}:length={positions}",
        )
    corpus, tokenizer = corpus_named(name), model.tokenizer
    text = evaluation_text(name, data_root)
    stream = tokenizer(text, verbose=False)["input_ids"]
    available = len(stream) // length
    if available < max(count or 0, 1):
        raise HarnessError(
            f"{name}@{corpus.evaluation_split} holds {available} windows of {length} tokens, {count or 1} are asked",
            fix=f"{name}:windows={available}:length={length}, or shorter windows",
        )
    count = count or available
    ids = torch.tensor(stream[: count * length], dtype=torch.int64).reshape(count, length)
    return EvaluationWindows(
        ids,
        {
            "corpus": name,
            "split": corpus.evaluation_split,
            "text": corpus.rule,
            "text_sha256": text_sha256(text),
            "tokens_in_text": len(stream),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "special_tokens_added": len(tokenizer("a")["input_ids"])
            - len(tokenizer("a", add_special_tokens=False)["input_ids"]),
            "length": length,
            "windows_available": available,
            "ids_sha256": hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        }
        | _RULES
        | ({"python": platform.python_version()} if name == "pydoc" else {}),
    )


@torch.inference_mode()
def score_windows(
    model: LoadedModel,
    ids: Int[torch.Tensor, "windows length"],
    reference: Reference | None,
    progress: Callable[[int, int], None],
) -> WindowScores:
    """One forward pass a window, and one of the reference unless that is ``model`` itself."""
    probe = ids[:1, :_PROBE_TOKENS]
    sliced = head_is_all(model.module, probe)
    found = model.weights.run([partial(_states, model.module, window, sliced) for window in ids], progress)
    compared = 0 if reference is None else len(ids) if reference.windows is None else reference.windows
    other = reference.model if reference is not None and reference.model is not model else None
    against = iter(()) if other is None else _reference_logits(other, ids[:compared], probe)
    sums = np.zeros((3, len(ids)))
    for number, (window, states) in enumerate(zip(ids, found, strict=True)):
        logits = _logits(model.module, states, sliced)
        to_compare = next(against) if other is not None and number < compared else logits
        sums[:, number] = _window_sums(logits, to_compare if number < compared else None, window.to(model.device))
        if not np.isfinite(sums[:, number]).all():
            layer = first_not_finite(model.module, window[None])
            raise BadOutput(f"the model's probabilities in window {number} are not finite", where=layer)
    head = f"computed {POSITIONS_AT_ONCE} positions at a time" if sliced else "within the full forward pass"
    return WindowScores(sums[0], None if reference is None else (sums[1], sums[2]), head)


def _reference_logits(
    model: LoadedModel, ids: Int[torch.Tensor, "windows length"], probe: Int[torch.Tensor, "1 tokens"]
) -> Iterator[Logits]:
    sliced = head_is_all(model.module, probe)
    passes = [partial(_states, model.module, window, sliced) for window in ids]
    for states in model.weights.run(passes, lambda *_: None):
        yield _logits(model.module, states, sliced)


def head_is_all(module: PreTrainedModel, probe: Int[torch.Tensor, "1 tokens"]) -> bool:
    """Whether the logits are the output embedding of the last hidden states and nothing more.

    Found out by trying: some architectures cap or scale logits afterwards, and then the full forward pass is needed.
    """
    head = module.get_output_embeddings()
    if head is None or module.base_model is module:
        return False
    probe, hidden = probe.to(module.device), list[torch.Tensor]()
    hook = module.base_model.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
    try:
        logits = module(probe, use_cache=False).logits
    finally:
        hook.remove()
    if not hidden:  # the model reaches into its base
        hidden.append(module.base_model(probe, use_cache=False)[0])
    return torch.equal(head(hidden[0]), logits)


def _states(
    module: PreTrainedModel, window: Int[torch.Tensor, " length"], sliced: bool
) -> Float[torch.Tensor, "length hidden_or_vocabulary"]:
    """The last hidden states, or the logits where the head is not apart."""
    batch = window[None].to(module.device)
    run = module.base_model if sliced else module
    output = run(batch, use_cache=False)
    states: torch.Tensor = output[0][0] if sliced else output.logits[0]
    return states


def _logits(
    module: PreTrainedModel, states: Float[torch.Tensor, "length hidden_or_vocabulary"], sliced: bool
) -> Logits:
    """A function from a range of positions to their logits in float32."""
    head = module.get_output_embeddings() if sliced else torch.nn.Identity()
    return lambda start, stop: head(states[start:stop]).float()


def _window_sums(
    logits: Logits, reference: Logits | None, window: Int[torch.Tensor, " length"]
) -> tuple[float, float, float]:
    """Negative log-likelihood, KL divergence (nats) and top-1 agreements, summed over the predicted tokens."""
    nll = kl = agreeing = 0.0
    last = len(window) - 1
    for start in range(0, last, POSITIONS_AT_ONCE):
        stop = min(start + POSITIONS_AT_ONCE, last)
        log_q = torch.log_softmax(logits(start, stop), dim=-1)
        target = window[start + 1 : stop + 1, None]
        nll -= log_q.gather(1, target).sum(dtype=torch.float64).item()
        if reference is None:
            continue
        log_p = log_q if reference is logits else torch.log_softmax(reference(start, stop), dim=-1).to(log_q.device)
        agreeing += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        kl += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
    return nll, kl, agreeing


def _hashes(ids: Int[torch.Tensor, "windows length"]) -> npt.NDArray[np.uint8]:
    """SHA-256 of each window's token ids, [windows, 32]: what two models must share to be compared window by window."""
    rows = ids.numpy().astype("<i8")
    return np.array([list(hashlib.sha256(row.tobytes()).digest()) for row in rows], dtype=np.uint8)


def _result(
    spec: TaskSpec, scores: WindowScores, hashes: npt.NDArray[np.uint8], manifest: dict[str, Any], seconds: float
) -> TaskResult:
    count = spec.count("windows") or len(scores.nll)
    predicted = manifest["length"] - 1
    shared: dict[str, npt.NDArray[Any]] = {
        "window": np.arange(count),
        "window_hash": hashes[:count],
        "tokens": np.full(count, predicted),
    }
    manifest = manifest | {"windows": count}
    if scores.divergence is not None and spec.kind == "kl":
        manifest["divergence"] = "KL(full precision || this model) of the next-token distributions, nats per token"
        kl, agreement = (sums[:count] / predicted for sums in scores.divergence)
        measurements = [
            _mean("kl_divergence", kl, shared, higher_is_better=False),
            _mean("top1_agreement", agreement, shared, higher_is_better=True),
        ]
    else:
        measurements = [_perplexity(scores.nll[:count], predicted, shared)]
    return TaskResult(spec.key, tuple(measurements), seconds, manifest)


def _perplexity(nll: Vector, predicted: int, shared: dict[str, npt.NDArray[Any]]) -> Measurement:
    mean = nll.mean() / predicted
    value = math.exp(mean) if mean < 700 else math.inf
    per_window = _stderr(nll / predicted)
    return Measurement(
        metric="token_perplexity",
        value=value,
        stderr=None if per_window is None else value * per_window,
        n=len(nll),
        higher_is_better=False,
        samples=shared | {"nll": nll},
    )


def _mean(metric: str, values: Vector, shared: dict[str, npt.NDArray[Any]], *, higher_is_better: bool) -> Measurement:
    return Measurement(
        metric, float(values.mean()), _stderr(values), len(values), higher_is_better, shared | {metric: values}
    )


def _stderr(values: Vector) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
