"""The compiled sweep against llm-compressor's eager one, bit for bit."""

import subprocess
import sys

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils.impl_backend import ImplBackend
from llmcompressor.modifiers.gptq import gptq_quantize
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from maca_llmc.gptq import cpu_backend  # noqa: F401  # registers the compiled sweep

SCHEMES = [
    {"num_bits": bits, "symmetric": symmetric, **layout}
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for layout in (
        {"strategy": "group", "group_size": 32},
        {"strategy": "group", "group_size": 32, "actorder": "static"},
        {"strategy": "group", "group_size": 32, "actorder": "weight"},
        {"strategy": "channel"},
        {"strategy": "tensor"},
    )
]


def problem(scheme, dtype, batch=2, rows=48, columns=96):
    """Weights, Hessians and min-max scales of one layer."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(batch, rows, columns, generator=generator)
    inputs = torch.randn(batch, 200, columns, generator=generator)
    inputs *= torch.rand(columns, generator=generator) * 3
    hessians = inputs.transpose(1, 2) @ inputs
    groups = {"group": columns // 32, "channel": 1, "tensor": 1}[scheme["strategy"]]
    if scheme["strategy"] == "tensor":
        grouped = weights.reshape(batch, 1, 1, -1)
    else:
        grouped = weights.reshape(batch, rows, groups, -1)
    levels = 2 ** scheme["num_bits"] - 1
    if scheme["symmetric"]:
        scale = grouped.abs().amax(-1) * 2 / levels
        zero = torch.zeros_like(scale)
    else:
        low = grouped.amin(-1)
        scale = (grouped.amax(-1) - low) / levels
        zero = (-(levels + 1) / 2 - low / scale).round()
    if scheme["strategy"] == "tensor":
        scale, zero = scale.reshape(batch, 1), zero.reshape(batch, 1)
    return weights.to(dtype), hessians, scale.to(dtype), zero.to(torch.int8)


def solve(scheme, dtype, eager, monkeypatch):
    weights, hessians, scale, zero = problem(scheme, dtype)
    calls = []
    if eager:
        monkeypatch.setattr(ImplBackend, "_backends", {})
    else:
        original = gptq_quantize.column_scale_window
        monkeypatch.setattr(
            gptq_quantize,
            "column_scale_window",
            lambda *a, **k: calls.append(1) or original(*a, **k),
        )
    result = quantize_weight(
        weights=weights.float(),
        hessians=hessians,
        scale=scale,
        zero_point=zero,
        global_scale=None,
        quant_args=QuantizationArgs(**scheme),
        blocksize=40,
    )
    monkeypatch.undo()
    assert not calls, "the eager sweep ran in place of the compiled one"
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_codes_are_those_of_the_eager_sweep(scheme, dtype, monkeypatch):
    eager, eager_loss, _ = solve(scheme, dtype, True, monkeypatch)
    compiled, loss, fallback = solve(scheme, dtype, False, monkeypatch)
    assert torch.equal(compiled, eager)
    assert torch.allclose(loss, eager_loss, rtol=1e-6)
    assert not fallback.any()


THREADS = """
import torch
torch.set_num_threads(1)
from maca_llmc.gptq.cpu_sweep import sweep_block
work = torch.randn(4, 8)
step, out, errors = (torch.ones_like(work) for _ in range(3))
sweep_block(work, torch.eye(8), step, None, (-8, 7), out, errors)
print(torch.get_num_threads())
"""


def test_the_number_of_threads_is_left_alone():
    """In a process of its own: it is the first launch of numba's threads that would set it."""
    found = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert found.stdout.split()[-1:] == ["1"], found.stderr
