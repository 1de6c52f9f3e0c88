"""DuQuant's search, permutation and transforms: exact, orthogonal, and nothing but a change of coordinates."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.methods.duquant import DuQuant, smoothing_scale, zigzag
from harness.methods.duquant_search import Cloud, base_rotation, exchange, greedy_rotation, random_rotation
from harness.transform import BlockRotation, Permutation

FEW = {"max_rotation_step": 8}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outliers(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    """A normal outlier channel, and one massive value."""
    x = torch.randn(rows, channels, generator=seeded(seed))
    x[:, 4 % channels] *= 8
    x[rows // 2, 7 % channels] = 60
    return x.numpy()


@pytest.mark.parametrize("size", [2, 4, 16, 64, 128])
def test_the_base_rotation_spreads_channel_zero_evenly(size: int) -> None:
    r = base_rotation(size)
    np.testing.assert_allclose(r @ r.T, np.eye(size), atol=1e-12)
    assert np.linalg.det(r) == pytest.approx(1 if size > 2 else np.linalg.det(r))
    np.testing.assert_allclose(r[0], size**-0.5)
    if size >= 4:
        assert np.flatnonzero(np.abs(r[:, 0]) > 1e-12).tolist() == [0, size - 2]
        assert r[size - 2, 0] == pytest.approx(-np.sqrt(1 - 1 / size))


def test_the_base_rotation_of_four_channels() -> None:
    a, b, c = 1 / np.sqrt(2), 1 / np.sqrt(6), 1 / np.sqrt(12)
    expected = [[0.5, 0.5, 0.5, 0.5], [0, b, -2 * b, b], [-3 * c, c, c, c], [0, -a, 0, a]]
    np.testing.assert_allclose(base_rotation(4), expected, atol=1e-15)


@given(size=st.sampled_from([2, 8, 64]), seed=st.integers(0, 2**31), channel=st.integers(0, 63))
@settings(max_examples=30, deadline=None)
def test_random_rotations(size: int, seed: int, channel: int) -> None:
    m, e = random_rotation(size, seeded(seed)), channel % size
    np.testing.assert_allclose(m.T @ m, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(m[:, 0], base_rotation(size)[:, 0])
    order = exchange(size, e)
    steered = m[order][:, order]  # S M S: what the search multiplies by
    np.testing.assert_allclose(steered @ steered.T, np.eye(size), atol=1e-12)
    assert steered[e, e] == pytest.approx(size**-0.5)


def naive_search(rows: np.ndarray, m: np.ndarray, steps: int, by: str, score: str) -> tuple[list[float], list[int]]:
    """Every row times every factor, in float64, one factor after another."""
    z, size = rows.astype(np.float64), rows.shape[1]
    scores, selected = [], []
    for step in range(steps + 1):
        scores.append(z.max() - z.min() if score == "range" else np.abs(z).max())
        if step == steps:
            return scores, selected
        at = z.argmax() if z.max() > -z.min() else z.argmin()
        row, channel = divmod(int(at), size)
        selected.append(channel if by == "paper" else row % size)
        s = np.eye(size)[exchange(size, selected[-1])]
        z = z @ (s @ m @ s)
    raise AssertionError


@pytest.mark.parametrize("by", ["paper", "official"])
@pytest.mark.parametrize("score", ["range", "absmax"])
@given(rows=st.integers(1, 700), size=st.sampled_from([4, 16, 64]), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_search_selects_what_the_textbook_search_does(rows: int, size: int, seed: int, by: Any, score: Any) -> None:
    x, m = outliers(rows, size, seed), random_rotation(size, seeded(seed))
    scores, selected = naive_search(x, m, 12, by, score)
    found = greedy_rotation(x, lambda: m, 12, by=by, score=score)
    assert list(found.selected) == selected
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    assert found.steps == int(np.argmin(found.scores))


@given(
    rows=st.integers(1, 900),
    clusters=st.integers(1, 20),
    spread=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    tail=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_extremes_are_those_of_all_rows(rows: int, clusters: int, spread: float, tail: float, seed: int) -> None:
    """Whatever the rows are like: clustered, equal, zero, or of lengths over many magnitudes."""
    g = seeded(seed)
    centres = torch.randn(clusters, 16, generator=g)
    lengths = torch.exp(tail * torch.randn(rows, 1, generator=g))
    x = lengths * (centres[torch.randint(clusters, (rows,), generator=g)] + spread * torch.randn(rows, 16, generator=g))
    x[: rows // 10] = 0
    cloud, rotation = Cloud.of(x.numpy()), random_rotation(16, g).astype(np.float32)
    values = x.numpy() @ rotation
    low, high = cloud.extremes(rotation, "range")
    assert (low.value, high.value) == pytest.approx((values.min(), values.max()), rel=1e-5)
    for found in (low, high):
        assert values[found.row, found.channel] == pytest.approx(found.value, rel=1e-5)
    low, high = cloud.extremes(rotation, "absmax")
    assert max(-low.value, high.value) == pytest.approx(np.abs(values).max(), rel=1e-5)


def test_most_rows_are_never_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = outliers(4000, 64)
    cloud, seen = Cloud.of(x), []
    found = Cloud._found
    monkeypatch.setattr(Cloud, "_found", lambda self, v, at, c: seen.append(len(c)) or found(self, v, at, c))
    cloud.extremes(random_rotation(64, seeded()).astype(np.float32), "range")
    assert max(seen) < 1000


def test_a_longer_search_is_never_worse_and_begins_alike() -> None:
    x, m = outliers(300, 32), random_rotation(32, seeded())
    short, long = (greedy_rotation(x, lambda: m, n, by="paper", score="range") for n in (6, 40))
    assert long.selected[:6] == short.selected and long.scores[:7] == short.scores
    assert min(long.scores) <= min(short.scores) <= short.scores[0]
    rotated = x @ long.rotation
    assert rotated.max() - rotated.min() == pytest.approx(min(long.scores), rel=1e-4)


def test_a_fresh_matrix_at_every_step_is_another_search() -> None:
    x = torch.from_numpy(outliers(100, 32))
    one, _ = DuQuant(max_rotation_step=6).find_rotation(x, 32, seeded())
    other, facts = DuQuant(max_rotation_step=6, fresh_q_per_step=True).find_rotation(x, 32, seeded())
    assert facts["orthogonality"] < 1e-12
    assert not torch.equal(one.matrix, other.matrix)


def test_the_block_with_the_outlier_alone_can_be_searched() -> None:
    """Remark 2: what other blocks hold does not matter then."""
    x = torch.randn(50, 64, generator=seeded())
    x[3, 40] = 50
    other = x.clone()
    other[:, :32] = torch.randn(50, 32, generator=seeded(1))
    method = DuQuant(search_rows="outlier_block", max_rotation_step=6)
    rotations = [method.find_rotation(t, 32, seeded(2))[0].matrix for t in (x, other, x[:, 32:])]
    assert torch.equal(rotations[0], rotations[1]) and torch.equal(rotations[0], rotations[2])
    every = DuQuant(max_rotation_step=6).find_rotation(x, 32, seeded(2))[1]
    assert every["score_before"] == pytest.approx(float(x.max() - x.min()))


@pytest.mark.parametrize(
    ("blocks", "size", "expected"),
    [(4, 2, [0, 7, 1, 6, 2, 5, 3, 4]), (3, 4, [0, 5, 6, 11, 1, 4, 7, 10, 2, 3, 8, 9])],
)
def test_the_zigzag_there_and_back(blocks: int, size: int, expected: list[int]) -> None:
    falling = torch.arange(blocks * size, 0, -1.0)[None]
    assert zigzag(falling, size).indices.tolist() == expected


@given(blocks=st.integers(1, 12), size=st.sampled_from([2, 8, 16]), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_zigzag_balances_blocks(blocks: int, size: int, seed: int) -> None:
    x = (
        torch.randn(5, blocks * size, generator=seeded(seed))
        * torch.rand(blocks * size, generator=seeded(seed + 1)) ** 4
    )
    permutation = zigzag(x, size)
    assert sorted(permutation.indices.tolist()) == list(range(blocks * size))
    means = permutation.apply(x).abs().amax(dim=0).reshape(blocks, size).mean(dim=1)
    largest = x.abs().amax(dim=0)
    assert float(means.max() - means.min()) <= float(largest.max() - largest.min()) / size + 1e-6


def test_ties_in_the_zigzag_keep_the_lower_channel_first() -> None:
    assert zigzag(torch.ones(1, 8), 4).indices.tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_massive_outliers_are_spread_and_blocks_evened_out() -> None:
    x = torch.randn(256, 512, generator=seeded())
    x[:, 17] *= 20
    x[40, 300] = 300
    steps, facts = DuQuant(block_size=64, max_rotation_step=64).find_steps(x, seeded())
    assert [type(step) for step in steps] == [BlockRotation, Permutation, BlockRotation]
    before, after_first, after_second = facts["largest_values"]
    assert before == 300 and after_second < after_first < 0.5 * before
    rotated, permuted = facts["block_variances"]
    assert permuted < 0.05 * rotated
    for step in steps:
        x = step.apply(x)
    assert float(x.abs().max()) == after_second


@pytest.mark.parametrize("times", [0, 1, 3])
def test_rounds_of_permutation(times: int) -> None:
    x = torch.from_numpy(outliers(64, 128))
    steps, facts = DuQuant(permutation_times=times, block_size=32, **FEW).find_steps(x, seeded())
    assert len(steps) == 2 * times + 1 and len(facts["searches"]) == times + 1
    assert len(facts["block_variances"]) == 2 * times
    assert all(search["score_after"] <= search["score_before"] for search in facts["searches"])


def test_smoothing_scales() -> None:
    activation, weight = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([0.25, 1.0, 1e9])
    scale = smoothing_scale(activation, weight, 0.5)
    assert scale[0] == pytest.approx(20) and scale[1] == pytest.approx(1) and scale[2] == pytest.approx(0.01)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        HarnessError, match=r"blocks of 128 do not divide 576 input channels[\s\S]*2, 4, 8, 16, 32, 64, or"
    ):
        DuQuant(block_size=128).find_steps(torch.zeros(1, 576), seeded())
