import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.kernels.bits import pack_bits, unpack_bits


@given(st.sampled_from([2, 3, 4, 8]), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 99))
def test_unpacking_gives_back_every_code(bits: int, shape: list[int], seed: int) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert 0 <= 8 * packed.numel() - bits * codes.numel() < 24  # nothing but the padding of the last word
    assert torch.equal(unpack_bits(packed, bits, tuple(shape)), codes)


def test_first_code_lies_in_the_lowest_bits() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01]
    assert pack_bits(torch.tensor([0xA, 0x5], dtype=torch.uint8), 4).tolist() == [0x5A]


def test_three_bits_take_three_bytes_for_eight_codes() -> None:
    assert pack_bits(torch.full((8,), 7, dtype=torch.uint8), 3).tolist() == [255, 255, 255]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"does not fit in {bits} bits"):
        pack_bits(torch.tensor([0, 2**bits, 0, 0], dtype=torch.uint8), bits)
