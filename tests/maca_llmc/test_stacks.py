"""Which modules of one input are swept together; what they give is tested with the modifier."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from maca_llmc import stacks
from maca_llmc.stacks import row_stacks

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
