"""Weights against loops over what their scales belong to."""

import pytest
import torch
from maca_serve.dequantization import dequantize
from maca_serve.doctor.layouts import Scheme
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
