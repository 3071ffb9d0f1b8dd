import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from maca_serve.formats.packing import unpack, unpack_columns
from packed import pack


def random_codes(bits, rows, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, count)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=draw)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 10, 11, 32, 33, 80, 104])
def test_repack_unpacks_what_a_bit_string_says(bits, count):
    codes = random_codes(bits, 3, count)
    assert torch.equal(unpack(pack(codes, bits), bits, count).long(), codes)
    assert torch.equal(unpack_columns(pack(codes, bits).T, bits, count).long(), codes.T)


def test_more_rows_than_are_unpacked_at_a_time():
    codes = random_codes(3, 2500, 5)
    assert torch.equal(unpack(pack(codes, 3), 3, 5).long(), codes)
    assert unpack(torch.empty(0, 1, dtype=torch.int32), 3, 5).shape == (0, 5)


def test_repack_may_use_compressed_tensors_packer_for_4_bits_and_not_for_3():
    """Of the serve environment, 0.17."""
    codes = random_codes(4, 5, 44)
    assert torch.equal(pack_to_int32(codes.to(torch.int8), 4), pack(codes, 4))
    codes = random_codes(3, 5, 44)
    assert not torch.equal(pack_to_int32(codes.to(torch.int8), 3)[:, :5], pack(codes, 3))


@pytest.mark.parametrize("words", [torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32)])
def test_rows_of_another_length_or_type_are_refused(words):
    with pytest.raises(ValueError, match="is not rows of 32 3-bit codes"):
        unpack(words, 3, 32)
