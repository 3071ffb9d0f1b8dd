"""Weights against loops over what their scales belong to."""

import pytest
import torch
from maca_serve.doctor.layouts import Scheme
from maca_serve.formats.dequantization import dequantize
from packed import pack

SIZE = OUT, WIDTH = 5, 12


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(
    ("scheme", "shape", "place"),
    [
        (Scheme("int-quantized", 8, strategy="tensor"), (1,), lambda i, j: (0,)),
        (Scheme("int-quantized", 8, strategy="tensor"), (), lambda i, j: ()),
        (Scheme("int-quantized", 8, strategy="channel"), (OUT, 1), lambda i, j: (i, 0)),
        (Scheme("naive-quantized", 8, 4), (OUT, 3), lambda i, j: (i, j // 4)),
        # The last blocks of both kinds are not whole.
        (
            Scheme("float-quantized", 8, strategy="block", block=(2, 8)),
            (3, 2),
            lambda i, j: (i // 2, j // 8),
        ),
    ],
    ids=["tensor", "scalar", "channel", "group", "block"],
)
def test_codes_that_are_stored_one_by_one(scheme, shape, place, zero_points):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, SIZE, generator=draw, dtype=torch.int8)
    scale = torch.randn(shape, generator=draw)
    zero = torch.randint(-128, 128, shape, generator=draw, dtype=torch.int8)
    tensors = {"weight": codes, "weight_scale": scale}
    if zero_points:
        tensors["weight_zero_point"] = zero
        scheme = Scheme(**{**vars(scheme), "symmetric": False})
    found = dequantize(tensors, scheme, SIZE)
    for i in range(OUT):
        for j in range(WIDTH):
            code = int(codes[i, j]) - (int(zero[place(i, j)]) if zero_points else 0)
            assert found[i, j] == code * scale[place(i, j)]


def unsigned(rows, count, bits, seed):
    """Random codes as GPTQ and AWQ mean them, from 0 on."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, count), generator=draw)


def packed_rows(codes, bits):
    """Words of each row, the first code in the lowest bits."""
    return pack(codes - 2 ** (bits - 1), bits)


@pytest.mark.parametrize(("bits", "offset"), [(4, 1), (4, 0), (3, 1), (8, 1), (2, 0)])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_packs_inputs_and_stores_zero_points_less_one(bits, offset, ordered, symmetric):
    out, width, group = 32, 64, 16
    codes, zeros = unsigned(out, width, bits, 0), unsigned(out, width // group, bits, 1)
    scales = torch.rand(width // group, out, dtype=torch.float64) + 0.5
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2)) // group
    tensors = {
        "qweight": packed_rows(codes, bits).T.contiguous(),
        "qzeros": packed_rows(zeros.T, bits),
        "scales": scales,
        "g_idx": order.int(),
    }
    actorder = "group" if ordered else None
    scheme = Scheme("gptq", bits, group, symmetric=symmetric, actorder=actorder, zero_offset=offset)
    found = dequantize(tensors, scheme, (out, width))
    for i in range(out):
        for j in range(width):
            g = int(order[j]) if ordered else j // group
            zero = 2 ** (bits - 1) if symmetric else int(zeros[i, g]) + offset
            assert found[i, j] == (int(codes[i, j]) - zero) * scales[g, i]


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_packs_eight_outputs_out_of_order(symmetric):
    out, width, group = 16, 8, 4
    codes, zeros = unsigned(width, out, 4, 0), unsigned(width // group, out, 4, 1)
    scales = torch.rand(width // group, out, dtype=torch.float64) + 0.5

    def words(rows):
        """AutoAWQ's loop: nibble i of a word holds output ORDER[i] of its eight."""
        found = torch.zeros(len(rows), out // 8, dtype=torch.int64)
        for word in range(out // 8):
            for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                found[:, word] |= rows[:, 8 * word + place] << 4 * i
        return torch.where(found < 2**31, found, found - 2**32).int()

    tensors = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}
    if symmetric:
        del tensors["qzeros"]
    found = dequantize(tensors, Scheme("awq", 4, group, symmetric=symmetric), (out, width))
    for i in range(out):
        for j in range(width):
            zero = 8 if symmetric else int(zeros[j // group, i])
            assert found[i, j] == (int(codes[j, i]) - zero) * scales[j // group, i]


def test_codes_of_eight_bit_floats():
    codes = torch.tensor([[0.5, -448.0], [1.125, 0.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0], [-4.0]], dtype=torch.bfloat16)
    scheme = Scheme("float-quantized", 8, strategy="channel", kind="float")
    found = dequantize({"weight": codes, "weight_scale": scale}, scheme, (2, 2))
    assert found.dtype == torch.bfloat16 and found.tolist() == [[1.0, -896.0], [-4.5, 0.0]]


def test_features_out_of_order_take_their_own_groups_scale():
    codes = torch.tensor([[1, -4, 3, 0], [2, -1, -2, -3]])
    scale = torch.tensor([[1.0, 100.0], [2.0, -3.0]])
    tensors = {
        "weight_packed": pack(codes, 3),
        "weight_scale": scale,
        "weight_g_idx": torch.tensor([1, 0, 0, 1], dtype=torch.int32),
    }
    found = dequantize(tensors, Scheme("pack-quantized", 3, group_size=2), (2, 4))
    assert torch.equal(found, codes * scale[:, [1, 0, 0, 1]])
