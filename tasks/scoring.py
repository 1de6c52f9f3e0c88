"""Log-likelihoods of many requests from few forward passes: shared beginnings once, no head where nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from harness.models import LoadedModel
from harness.tasks.perplexity import head_is_all
from harness.tasks.prefix_tree import Request, Tree, grow_trees, pack

POSITIONS_AT_ONCE = 128  # of the output head: keeps float32 logits at 25 MB for 49,152 tokens
_BUDGET = {"cpu": 2048, "cuda": 16384}  # tokens of a forward pass
_PASSES_AT_ONCE = 64
_TOLERANCE = 0.05  # of the hidden states' size; a mask or position that is ignored changes them far more


@dataclass(frozen=True)
class Scorer:
    """How one model is asked: found out once, by trying."""

    model: LoadedModel
    sliced: bool
    """Whether the head can be computed apart, at the positions that are read."""
    shares: bool
    """Whether the model takes masks and positions as given, so that requests can share their beginning."""

    @classmethod
    def of(cls, model: LoadedModel) -> Scorer:
        probe = torch.arange(10, device=model.device)
        return cls(model, head_is_all(model.module, probe[None]), _takes_trees(model.module, probe))

    @property
    def budget(self) -> int:
        return _BUDGET.get(self.model.device.type, _BUDGET["cpu"])

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], advance: Callable[[int], None]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's targets, and whether they are what greedy decoding would say.

        ``advance`` is told how many requests each forward pass has answered.
        """
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        module = self.model.module
        width = module.config.get_text_config().hidden_size
        share = self.shares and _within_window(module, requests)
        batches = list(pack(grow_trees(requests, largest=self.budget, width=width, share=share), self.budget))
        for trees, states in zip(batches, self._states(batches), strict=True):
            found = self._read(states, trees, requests)
            for number, answer in found.items():
                answers[number] = answer
            advance(len(found))
        return answers

    def _states(self, batches: Sequence[Sequence[Tree]]) -> Iterator[torch.Tensor]:
        """What :func:`_forward` gives for each. Not all are under way at once: each has a mask in memory."""
        for start in range(0, len(batches), _PASSES_AT_ONCE):
            some = batches[start : start + _PASSES_AT_ONCE]
            passes = [partial(_forward, self.model.module, trees, self.sliced) for trees in some]
            yield from self.model.weights.run(passes, lambda *_: None)

    def _read(
        self, states: Float[torch.Tensor, "trees nodes _width"], trees: Sequence[Tree], requests: Sequence[Request]
    ) -> dict[int, tuple[float, bool]]:
        nodes: dict[tuple[int, int], int] = {}  # every node that is read, once
        reads = [
            (nodes.setdefault((row, node), len(nodes)), target, number)
            for row, tree in enumerate(trees)
            for number, path in tree.paths
            for node, target in zip(path, requests[number].targets, strict=True)
        ]
        reads.sort()
        at, targets, numbers = np.array(reads).T
        rows, columns = torch.tensor(list(nodes), device=states.device).T
        picked = states[rows, columns]
        log_probabilities, greedy = np.empty(len(reads)), np.empty(len(reads), dtype=np.bool_)
        for start in range(0, len(nodes), POSITIONS_AT_ONCE):
            first, last = np.searchsorted(at, (start, start + POSITIONS_AT_ONCE))
            logits = picked[start : start + POSITIONS_AT_ONCE]
            if self.sliced:
                logits = self.model.module.get_output_embeddings()(logits)
            table = torch.log_softmax(logits.float(), dim=-1)
            index = torch.from_numpy(at[first:last] - start).to(table.device)
            target = torch.from_numpy(targets[first:last]).to(table.device)
            log_probabilities[first:last] = table[index, target].cpu().numpy()
            greedy[first:last] = (table.argmax(-1)[index] == target).cpu().numpy()
        sums, misses = np.bincount(numbers, log_probabilities), np.bincount(numbers, ~greedy)
        return {number: (float(sums[number]), not misses[number]) for tree in trees for number, _ in tree.paths}


def _forward(
    module: PreTrainedModel, trees: Sequence[Tree], sliced: bool
) -> Float[torch.Tensor, "trees nodes hidden_or_vocabulary"]:
    """Last hidden states, or logits where the head is not apart; one row a tree, padded on the right."""
    shape = len(trees), max(map(len, trees))
    tokens, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree)], positions[row, : len(tree)] = tree.tokens, tree.depths
    ids = torch.from_numpy(tokens).to(module.device)
    # A chain is an ordinary sequence, and what pads it comes after it.
    how = {} if all(tree.is_chain for tree in trees) else _tree_attention(module, trees, positions)
    run = module.base_model if sliced else module
    output = run(ids, use_cache=False, **how)
    states: torch.Tensor = output[0] if sliced else output.logits
    return states


def _tree_attention(
    module: PreTrainedModel, trees: Sequence[Tree], positions: Int[np.ndarray, "trees nodes"]
) -> dict[str, torch.Tensor]:
    count, length = positions.shape
    visible = np.broadcast_to(np.eye(length, dtype=np.bool_), (count, length, length)).copy()  # padding sees itself
    for row, tree in enumerate(trees):
        visible[row, : len(tree), : len(tree)] = tree.visible()
    mask = torch.zeros(count, 1, length, length, dtype=module.dtype)
    mask.masked_fill_(~torch.from_numpy(visible)[:, None], torch.finfo(module.dtype).min)
    return {"attention_mask": mask.to(module.device), "position_ids": torch.from_numpy(positions).to(module.device)}


@torch.inference_mode()
def _takes_trees(module: PreTrainedModel, probe: Int[torch.Tensor, " tokens"]) -> bool:
    """Whether two sequences of one beginning come out of a tree as they do alone."""
    tokens = tuple(probe.tolist())
    pair = [Request(tokens[:6], tokens[:1]), Request((*tokens[:3], *tokens[6:]), tokens[:1])]
    (tree,) = grow_trees(pair, largest=64, width=64, share=True)
    try:
        together = _forward(module, [tree], False)[0]
    except (TypeError, ValueError, RuntimeError):  # a model that knows no position_ids, or no masks of four dimensions
        return False
    for number, path in tree.paths:
        alone = module(torch.tensor([pair[number].tokens], device=module.device), use_cache=False).logits[0, -1]
        if not (together[path[-1]] - alone).norm() <= _TOLERANCE * alone.norm():
            return False
    return True


def _within_window(module: PreTrainedModel, requests: Sequence[Request]) -> bool:
    """Whether no request is longer than the model's sliding window: a tree's mask knows of none."""
    window = getattr(module.config.get_text_config(), "sliding_window", None)
    return window is None or max((len(request.tokens) for request in requests), default=0) <= window
