"""Which modules of one input are swept together; what they give is tested with the modifier."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from maca_llmc.gptq import stacks
from maca_llmc.gptq.stacks import cut_batches, positive_scales, row_stacks
from maca_llmc.llmcompressor_api import gptq_block_update

GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=32)


def module(rows, args=GROUP, dtype=torch.float32):
    linear = torch.nn.Linear(64, rows, dtype=dtype)
    linear.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return linear


def test_rows_of_one_kind_are_stacked_whatever_their_number():
    q, k, v = module(64), module(32), module(32)
    assert row_stacks([q, k, v]) == [[q, k, v]]


@pytest.mark.parametrize(
    "other",
    [
        {"args": QuantizationArgs(num_bits=8, strategy="channel")},
        {"args": GROUP.model_copy(update={"actorder": "weight"})},
        {"dtype": torch.bfloat16},
    ],
)
def test_other_arguments_and_dtypes_are_stacked_apart(other):
    q, k, v = module(64), module(32, **other), module(32)
    assert row_stacks([q, k, v]) == [[q, v], [k]]


@pytest.mark.parametrize("strategy", ["tensor", "block"])
def test_scales_that_span_rows_are_not_stacked(strategy):
    shape = {"block_structure": [16, 16]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, strategy=strategy, **shape)
    gate, up = module(96, args), module(96, args)
    assert row_stacks([gate, up]) == [[gate], [up]]


def test_a_stack_has_no_more_rows_than_are_swept_at_once(monkeypatch):
    monkeypatch.setattr(stacks, "ROWS_PER_STACK", 100)
    experts = [module(48) for _ in range(5)]
    assert [len(stack) for stack in row_stacks(experts)] == [2, 2, 1]
    wide = module(400)
    assert row_stacks([wide]) == [[wide]], "one module is never split"


def test_batches_are_cut_to_what_is_swept_at_once(monkeypatch):
    monkeypatch.setattr(stacks, "ROWS_PER_STACK", 100)
    narrow, wide = [module(48) for _ in range(5)], [module(400) for _ in range(2)]
    one, two, three, four, five = narrow
    assert cut_batches([narrow, wide]) == [[one, two], [three, four], [five], *([w] for w in wide)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_below_zero_are_said_without_a_sign(bits):
    """The same values, from a kernel that takes no negative scale (that of CUDA, as it is)."""
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32, symmetric=True)
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(1, 40, 64, generator=generator)
    inputs = torch.randn(256, 64, generator=generator)
    upper = torch.linalg.cholesky(torch.linalg.inv(inputs.T @ inputs), upper=True)
    sign = torch.where(torch.rand(1, 40, 2, generator=generator) < 0.5, -1, 1)
    scale = weight.view(1, 40, 2, 32).abs().amax(dim=-1) / 2 ** (bits - 1) * sign
    zero_point = torch.zeros(scale.shape, dtype=torch.int8)

    def quantized(scale, zero_point, args):
        work, values, errors, squares = weight.clone(), *torch.zeros(3, *weight.shape)
        gptq_block_update.__wrapped__(
            work,
            upper[None],
            values,
            errors,
            squares,
            scale=scale,
            zero_point=zero_point,
            global_scale=None,
            g_idx=torch.arange(64, dtype=torch.int) // 32,
            quant_args=args,
            i1=0,
        )
        return values

    said = positive_scales(scale, zero_point, args)
    assert said[0].min() > 0 and said[1].unique().tolist() == [-1, 0] and not said[2].symmetric
    assert torch.equal(quantized(*said), quantized(scale, zero_point, args))


def test_scales_above_zero_are_left_alone():
    scale, zero_point = torch.ones(1, 4, 2), torch.zeros(1, 4, 2, dtype=torch.int8)
    assert positive_scales(scale, zero_point, GROUP) == (scale, zero_point, GROUP)
