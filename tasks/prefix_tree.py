"""Requests that begin alike as one tree of tokens, so that what they share is computed once.

The choices of a document share its context; the documents of a few-shot task share their examples. A request is read at
the nodes of its own path: each token sees its ancestors only, at a position that is its depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

PASS_TOKENS = 40  # what a forward pass of a small model on two cores costs beside its tokens, in tokens


@dataclass(frozen=True)
class Request:
    """The tokens that a model reads, and those it should say after the last ``len(targets)`` of them."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], longest: int) -> Request:
        """Of a context and its continuation, cut from the left to what a model of ``longest`` positions can read."""
        whole = [*context, *continuation][-(longest + 1) :]
        kept = min(len(continuation), len(whole) - 1)
        return cls(tuple(whole[:-1]), tuple(continuation[len(continuation) - kept :]))


@dataclass
class Tree:
    """Tokens [n] with their parents (−1: none) and depths; a parent comes before its children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[tuple[int, list[int]]] = field(default_factory=list)
    """Of each request in it: its number, and the nodes at which its targets are read."""
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether it is one sequence, for which the model's own causal mask is right."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def shared(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are in the tree already."""
        node, count = -1, 0
        for token in tokens:
            following = self._children.get((node, token))
            if following is None:
                break
            node, count = following, count + 1
        return count

    def add(self, number: int, request: Request) -> None:
        node, path = -1, []
        for token in request.tokens:
            following = self._children.get((node, token))
            if following is None:
                following = len(self.tokens)
                self._children[node, token] = following
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(self.depths[node] + 1 if node >= 0 else 0)
            node = following
            path.append(node)
        self.paths.append((number, path[len(path) - len(request.targets) :]))

    def visible(self) -> npt.NDArray[np.bool_]:
        """[n, n]: whether a node (row) sees another (column): itself and its ancestors."""
        seen = np.zeros((len(self), len(self)), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node, : parent + 1] = seen[parent, : parent + 1]
            seen[node, node] = True
        return seen


def grow_trees(requests: Sequence[Request], *, largest: int, width: int, share: bool) -> list[Tree]:
    """Every request in one tree, or with ``share`` false each in its own.

    ``largest`` is the most nodes of a tree of several requests. Sharing saves the linears' work on the common tokens,
    about ``width`` (the model's) times that of one pair of tokens in attention, and costs the pairs of tokens that have
    nothing to do with each other: a request joins the tree as long as it saves more than it costs.
    """
    trees: list[Tree] = []
    for number in sorted(range(len(requests)), key=lambda at: requests[at].tokens):
        request = requests[number]
        if not (share and trees and _joins(trees[-1], request, largest, width)):
            trees.append(Tree())
        trees[-1].add(number, request)
    return trees


def _joins(tree: Tree, request: Request, largest: int, width: int) -> bool:
    saved = tree.shared(request.tokens)
    added = len(request.tokens) - saved
    return len(tree) + added <= largest and saved * width > len(tree) * added


def pack(trees: Sequence[Tree], budget: int) -> Iterator[list[Tree]]:
    """Trees of about one size together, ``budget`` tokens at most with the padding; chains apart from the others.

    Of all ways to cut the trees, longest first, into batches, the one that computes least: padding is computed too, and
    a forward pass costs as much as ``PASS_TOKENS`` tokens however short it is.
    """
    for chains in (False, True):
        some = sorted((tree for tree in trees if tree.is_chain == chains), key=len, reverse=True)
        yield from (some[start:end] for start, end in _cheapest_cuts([len(tree) for tree in some], budget))


def _cheapest_cuts(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Where to cut falling ``lengths`` into batches: the cheapest way to the first n, for one n after the other."""
    costs, starts = np.full(len(lengths) + 1, np.inf), np.zeros(len(lengths) + 1, dtype=np.int64)
    costs[0] = 0
    for start, longest in enumerate(lengths):
        most = max(1, budget // longest)
        ends = np.arange(start + 1, min(start + most, len(lengths)) + 1)
        cost = costs[start] + PASS_TOKENS + longest * (ends - start)
        better = cost < costs[ends]
        costs[ends[better]], starts[ends[better]] = cost[better], start
    cuts, end = [], len(lengths)
    while end:
        cuts.append((int(starts[end]), end))
        end = int(starts[end])
    return cuts[::-1]
