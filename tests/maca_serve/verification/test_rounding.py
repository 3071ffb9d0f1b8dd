"""Rounded inputs against a loop in float64, and against vLLM's own operator."""

import json
import subprocess
import sys

import pytest
import torch
from maca_serve.doctor.layouts import Inputs
from maca_serve.verification.rounding import RoundedLinear, can_round, round_tokens

TOKENS = 7
WIDTH = 48


@pytest.fixture
def x():
    """Tokens of very different sizes, one of them with one sign only."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3, 0.1, 1.0, 10.0, 300.0, 1.0, 1.0])[:, None]
    x = torch.randn(TOKENS, WIDTH, generator=draw) * sizes
    x[5] = x[5].abs()
    return x


def by_hand(token, symmetric):
    """(code - zero point, scale) of each number of one token."""
    values = token.double().tolist()
    if symmetric:
        scale = max(map(abs, values)) / 127
        return [max(-128, min(127, round(v / scale))) for v in values], scale
    scale = (max(values) - min(values)) / 255
    zero = round(-128 - min(values) / scale)
    return [max(-128, min(127, round(v / scale) + zero)) - zero for v in values], scale


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_are_rounded_as_a_loop_rounds_them(x, symmetric):
    found = round_tokens(x, symmetric=symmetric)
    for token, row in zip(x, found, strict=True):
        codes, scale = by_hand(token, symmetric)
        # A tie may fall otherwise in float32; none does here.
        assert row.tolist() == pytest.approx([code * scale for code in codes], rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_of_zeros_stays_one(symmetric):
    assert torch.equal(round_tokens(torch.zeros(1, 4), symmetric=symmetric), torch.zeros(1, 4))


def test_a_layer_multiplies_codes_and_keeps_its_inputs_dtype(x):
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, (5, WIDTH), generator=draw)
    scale = torch.rand(5, 1, generator=draw)
    bias = torch.randn(5, generator=draw)
    inputs = Inputs(8, "int", "token", symmetric=True, static=False)
    layer = RoundedLinear(codes * scale, bias, inputs)
    wanted = []
    for token in x:
        found, own = by_hand(token, symmetric=True)
        sums = (codes * torch.tensor(found)).sum(1).double()
        wanted.append(sums * own * scale[:, 0].double() + bias.double())
    assert torch.allclose(layer(x).double(), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_are_rounded_as_vllm_rounds_them(x, symmetric):
    code = (
        "import json, sys, torch, vllm._custom_ops as ops\n"
        "x = torch.tensor(json.loads(sys.argv[1]))\n"
        f"q, scale, zero = ops.onednn_scaled_int8_quant(x, None, None, {symmetric})\n"
        "print(json.dumps(((q.float() - (0 if zero is None else zero)) * scale).tolist()))"
    )
    command = [sys.executable, "-c", code, json.dumps(x.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "has no attribute 'dynamic_scaled_int8_quant'" in done.stderr:
        pytest.skip("this vLLM has no int8 operator for this machine")
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(round_tokens(x, symmetric=symmetric), theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("inputs", "yes"),
    [
        (Inputs(8, "int", "token", symmetric=False, static=False), True),
        (Inputs(8, "int", "tensor", symmetric=True, static=True), False),
        (Inputs(8, "float", "token", symmetric=True, static=False), False),
        (Inputs(4, "int", "token", symmetric=True, static=False), False),
        (Inputs(8, "int", "group", symmetric=True, static=False), False),
    ],
)
def test_inputs_that_can_be_rounded(inputs, yes):
    assert can_round(inputs) is yes
