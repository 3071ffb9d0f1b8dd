"""Layouts against the libraries that write them."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from maca_serve.doctor.layouts import Inputs, Scheme, expected, known, module_size, words

NAMES = {torch.int32: "I32", torch.int8: "I8"}


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_compressed_tensors(bits):
    codes = torch.zeros(6, 72, dtype=torch.int8)
    packed = pack_to_int32(codes, bits)
    tensors = expected(Scheme("pack-quantized", bits, 24), 6, 72)
    assert tuple(packed.shape) in tensors["weight_packed"].shapes
    assert NAMES[packed.dtype] in tensors["weight_packed"].dtypes


def test_three_bits_are_dense():
    assert words(1536, 3) == 144
    assert words(33, 3) == 4


def test_group_scales_and_zero_points():
    tensors = expected(Scheme("pack-quantized", 4, 64, symmetric=False), 576, 1536)
    assert tensors["weight_scale"].shapes == ((576, 24),)
    assert tensors["weight_zero_point"].shapes == ((72, 24),)
    assert "weight_zero_point" not in expected(Scheme("pack-quantized", 4, 64), 576, 1536)


def test_channel_tensor_and_block_scales():
    def scale(scheme):
        return expected(scheme, 256, 384)["weight_scale"].shapes

    assert scale(Scheme("int-quantized", 8, strategy="channel")) == ((256, 1),)
    assert scale(Scheme("int-quantized", 8, strategy="tensor")) == ((1,), ())
    block = Scheme("float-quantized", 8, strategy="block", kind="float", block=(128, 128))
    assert scale(block) == ((2, 3),)


def test_static_activations_have_a_scale():
    inputs = Inputs(8, "float", "tensor", symmetric=True, static=True)
    scheme = Scheme("float-quantized", 8, strategy="tensor", kind="float", inputs=inputs)
    assert expected(scheme, 4, 4)["input_scale"].required
    dynamic = replace(scheme, inputs=replace(inputs, static=False))
    assert "input_scale" not in expected(dynamic, 4, 4)


def test_gptq_packs_inputs_and_awq_outputs():
    gptq, awq = Scheme("gptq", 4, 128), Scheme("awq", 4, 128)
    assert expected(gptq, 512, 1024)["qweight"].shapes == ((128, 512),)
    assert expected(awq, 512, 1024)["qweight"].shapes == ((1024, 64),)
    assert expected(gptq, 512, 1024)["qzeros"].shapes == ((8, 64),)
    assert module_size(gptq, {"qweight": (128, 512)}, None) == (512, 1024)
    assert module_size(awq, {"qweight": (1024, 64)}, None) == (512, 1024)


def test_size_of_dense_codes_is_what_weight_shape_says():
    scheme = Scheme("pack-quantized", 3, 64)
    assert module_size(scheme, {"weight_packed": (8, 7)}, (8, 72)) == (8, 72)
    assert module_size(scheme, {"weight_scale": (8, 1)}, None) is None


def test_unknown_format():
    assert not known(Scheme("marlin-24", 4))
