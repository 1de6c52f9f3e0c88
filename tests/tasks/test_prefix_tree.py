from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks.prefix_tree import PASS_TOKENS, Request, Tree, grow_trees, pack

CHOICES = [Request((1, 2, 3, 4), (4, 9)), Request((1, 2, 3, 5, 6), (5, 6, 9)), Request((1, 2, 3), (7,))]


def test_a_request_is_cut_from_the_left():
    assert Request.of([1, 2, 3], [4, 5], longest=10) == Request((1, 2, 3, 4), (4, 5))
    assert Request.of([1, 2, 3], [4, 5], longest=3) == Request((2, 3, 4), (4, 5))
    assert Request.of([1], [2, 3, 4, 5], longest=3) == Request((2, 3, 4), (3, 4, 5))


def test_what_is_shared_is_there_once():
    (tree,) = grow_trees(CHOICES, largest=64, width=64, share=True)
    assert sorted(tree.tokens) == [1, 2, 3, 4, 5, 6]
    for number, path in tree.paths:
        assert len(path) == len(CHOICES[number].targets)
        assert tree.tokens[path[-1]] == CHOICES[number].tokens[-1]
        assert tree.depths[path[-1]] == len(CHOICES[number].tokens) - 1


def test_a_node_sees_itself_and_its_ancestors():
    (tree,) = grow_trees(CHOICES, largest=64, width=64, share=True)
    visible = tree.visible()
    for number, path in tree.paths:
        seen = np.flatnonzero(visible[path[-1]])
        assert [tree.tokens[node] for node in seen] == list(CHOICES[number].tokens)


def test_a_chain_sees_what_a_causal_mask_shows():
    tree = Tree()
    tree.add(0, CHOICES[1])
    assert tree.is_chain
    assert np.array_equal(tree.visible(), np.tri(5, dtype=bool))


def test_sharing_stops_where_it_costs_more_than_it_saves():
    alike = [Request((0, *range(10 * n, 10 * n + 9)), (1,)) for n in range(1, 9)]  # one token in common
    assert len(grow_trees(alike, largest=10_000, width=1, share=True)) == 8
    assert len(grow_trees(alike, largest=10_000, width=10_000, share=True)) == 1
    assert max(map(len, grow_trees(alike, largest=30, width=10_000, share=True))) <= 30
    assert len(grow_trees(alike, largest=10_000, width=10_000, share=False)) == 8


def test_requests_with_nothing_in_common_are_never_put_together():
    apart = [Request((n, n + 1), (1,)) for n in range(0, 40, 2)]
    assert len(grow_trees(apart, largest=10_000, width=10_000, share=True)) == 20


@pytest.mark.parametrize("budget", [1, 7, 100])
def test_packing_keeps_every_tree_and_the_budget(budget):
    requests = [Request(tuple(range(n, 2 * n + 1)), (1,)) for n in range(1, 12)] + CHOICES
    trees = grow_trees(requests, largest=100, width=64, share=True)
    batches = list(pack(trees, budget))
    assert sorted(number for batch in batches for tree in batch for number, _ in tree.paths) == list(range(14))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= budget
        assert len({tree.is_chain for tree in batch}) == 1


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.integers(1, 200))
def test_packing_computes_as_little_as_can_be(lengths, budget):
    trees = grow_trees([Request(tuple(range(n, 2 * n)), (1,)) for n in lengths], largest=100, width=64, share=False)

    def cost(batches):
        return sum(PASS_TOKENS + len(batch) * max(batch) for batch in batches)

    def all_cuts(rest):
        yield [rest]
        for i in range(1, len(rest)):
            yield from ([rest[:i], *others] for others in all_cuts(rest[i:]))

    falling = sorted(lengths, reverse=True)
    legal = (c for c in all_cuts(falling) if all(len(b) == 1 or len(b) * max(b) <= budget for b in c))
    assert cost([[len(tree) for tree in batch] for batch in pack(trees, budget)]) == min(map(cost, legal))
