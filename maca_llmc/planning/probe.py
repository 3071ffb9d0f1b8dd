"""How fast this machine does what calibration consists of, from a few seconds of trying."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from maca_llmc.common.device import fast_linears
from maca_llmc.gptq.cpu_sweep import sweep_block
from maca_llmc.gptq.hessian import add_rows
from maca_llmc.gptq.scales import CANDIDATES, column_costs, search_scales
from maca_llmc.gptq.solve import factorize, sweep
from maca_llmc.llmcompressor_api import all_experts_on_meta
from maca_llmc.model import loading
from maca_llmc.planning.distinct_inputs import forward_flops

TOKENS = {"cpu": 512, "cuda": 4096}
WIDEST = {"cpu": 1024, "cuda": 8192}
"""Large enough that a GPU computes and does not only launch."""

ROWS = 1024
BLOCK = 128
REPEATS = 3
SEARCHED = QuantizationArgs(num_bits=4, strategy="group", group_size=16, symmetric=True)


@dataclass(frozen=True)
class Speeds:
    """FLOP/s of each part: of a forward pass, of Hessians (a triangle counted once), of a solve.

    A solve is ``4/3 d^3`` for the factorisation and ``rows * d^2`` for the sweep; the search for
    scales looks at each weight once per scale that is tried.
    """

    forward: float
    hessian: float
    factorize: float
    sweep: float
    scales: float


def factorize_flops(width: int) -> float:
    """Two Cholesky factorisations and an inverse."""
    return 4 / 3 * width**3


def sweep_flops(rows: int, width: int) -> float:
    """What each column's error is spread over."""
    return float(rows * width**2)


def hessian_flops(tokens: int, width: int) -> float:
    """A triangle, counted once."""
    return float(tokens * width * (width + 1))


def search_flops(weights: int) -> float:
    """Multiply, shift, round, clamp, subtract, weigh and sum twice, for each scale tried."""
    return float(weights * CANDIDATES * 10)


def probe(config: Any, width: int, device: torch.device) -> Speeds:
    """Try each part on random numbers.

    :param config: of the model; one layer of it is made and run
    :param width: the widest input of a quantized module, tried up to ``WIDEST``
    :param device: to try it on
    """
    dtype = config.get_text_config().dtype or torch.bfloat16
    kind = "cuda" if device.type == "cuda" else "cpu"
    tried = min(width, WIDEST[kind])
    rows = torch.randn(2 * TOKENS[kind], tried, device=device).to(dtype)
    hessian = torch.zeros(tried, tried, device=device)
    adding = _seconds(lambda: add_rows(hessian, rows, 1.0), device)
    whole = (rows.float().t() @ rows.float()) / len(rows) + torch.eye(tried, device=device)
    factor = factorize(whole, 0.01, True)
    factorizing = _seconds(lambda: factorize(whole, 0.01, True), device)
    weights = torch.randn(1, ROWS, tried, device=device)
    sweeping = _seconds(lambda: sweep(weights.clone(), [factor], _round_block, BLOCK), device)
    costs = column_costs(factor.upper, factor.order)
    columns = tried - tried % SEARCHED.group_size
    part = weights[0, :, :columns].to(dtype)
    energies = part.float().square().sum(dim=1)
    searching = _seconds(lambda: search_scales(part, costs[:columns], energies, SEARCHED), device)
    return Speeds(
        forward=_forward_speed(config, TOKENS[kind], device),
        hessian=hessian_flops(len(rows), tried) / adding,
        factorize=factorize_flops(tried) / factorizing,
        sweep=sweep_flops(ROWS, tried) / sweeping,
        scales=search_flops(part.numel()) / searching,
    )


def _forward_speed(config: Any, tokens: int, device: torch.device) -> float:
    """Of one decoder layer of the model, of random weights, all experts on."""
    shapes = loading.meta_model(_one_layer(config))
    linear, quadratic = forward_flops(shapes)
    decoder = shapes.get_decoder().to_empty(device=device).eval()
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    with torch.no_grad(), all_experts_on_meta(), fast_linears(device):
        seconds = _seconds(lambda: decoder(input_ids=ids, use_cache=False), device)
    return (linear * tokens + quadratic * tokens**2) / seconds


def _one_layer(config: Any) -> Any:
    """A copy of the configuration with one layer, which shares no keys and values with others."""
    single = copy.deepcopy(config)
    text = single.get_text_config()
    layers, text.num_hidden_layers = text.num_hidden_layers, 1
    for name, value in vars(text).copy().items():
        if isinstance(value, list) and len(value) == layers:  # one entry per layer
            setattr(text, name, value[:1])
    if getattr(text, "num_kv_shared_layers", 0):
        text.num_kv_shared_layers = 0
    return single


def _round_block(
    work: torch.Tensor,
    factor: torch.Tensor,
    quantized: torch.Tensor,
    errors: torch.Tensor,
    _squares: torch.Tensor,
    *,
    i1: int,
) -> None:
    """A block update that stands for any: the compiled one, or a product of its size on a GPU."""
    if work.device.type == "cpu":
        steps = torch.ones_like(work[0])
        sweep_block(work[0], factor[0], steps, None, (-8.0, 7.0), quantized[0], errors[0])
    else:
        torch.bmm(work, factor, out=errors)


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The least of a few runs, after one to warm up."""
    least = float("inf")
    for attempt in range(REPEATS + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            least = min(least, time.perf_counter() - start)
    return least
