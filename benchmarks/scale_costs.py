"""What should the scale of a group be chosen by? Output errors of single layers.

    .venv/bin/python benchmarks/scale_costs.py     # writes benchmarks/results/scale_costs.json

All scales go into the same sweep of GPTQ. Hessians are those of the embedded model on its own
calibration sample. The measure is ``(w - q) H (w - q)^T / (w H w^T)`` over a module's rows, with H
not dampened, against that of min-max scales: geometric means over modules.
"""

import json
import math
import statistics
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from tables import markdown

from maca_llmc.common import record
from maca_llmc.common.defaults import MODEL
from maca_llmc.data import build_calibration_set
from maca_llmc.gptq.hessian import add_rows, mirror
from maca_llmc.gptq.losses import row_energies
from maca_llmc.gptq.scales import column_costs, search_scales
from maca_llmc.gptq.solve import Factor, factorize, sweep
from maca_llmc.llmcompressor_api import gptq_block_update
from maca_llmc.model import loading

RESULT = Path(__file__).parent / "results" / "scale_costs.json"
LAYERS = (1, 14, 27)
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SCHEMES = {
    "3 bits, groups of 32, asymmetric": (3, 32, False),
    "3 bits, groups of 64, symmetric": (3, 64, True),
    "4 bits, groups of 64, symmetric": (4, 64, True),
}


@torch.no_grad()
def capture() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and Hessian of some modules."""
    source = loading.resolve_model(MODEL)
    model = loading.load_model(source, loading.load_config(source), torch.bfloat16).eval()
    data = build_calibration_set(loading.load_tokenizer(source), scales=(512,), tokens=8192)
    found = {}
    for layer in LAYERS:
        for kind in KINDS:
            name = f"model.layers.{layer}.{kind}"
            module = model.get_submodule(name)
            hessian = torch.zeros(module.in_features, module.in_features)
            module.register_forward_pre_hook(
                lambda _, args, hessian=hessian: add_rows(hessian, args[0].flatten(0, 1), 1.0)
            )
            found[name] = module.weight, hessian
    for batch in data.dataloader(2048):
        model(**batch)
    for _, hessian in found.values():
        mirror(hessian)
    return found


def scales_of(
    weight: torch.Tensor, hessian: torch.Tensor, factor: Factor, args: QuantizationArgs
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zero points by what they are chosen for."""
    groups = weight.unflatten(1, (-1, args.group_size))
    variances = column_costs(factor.upper, factor.order)
    together = row_energies(weight.float(), hessian)
    none = torch.zeros_like(together)  # no more than the columns' own
    costs = {
        "squared error of the weights": (torch.ones(len(hessian)), none),
        "diagonal of H": (hessian.diagonal(), none),
        "conditional variance, 1 / U_jj^2": (variances, none),
        "the same, and what shrinks together": (variances, together),
    }
    found = {"range (min-max)": calculate_qparams(groups.amin(-1), groups.amax(-1), args)}
    return found | {name: search_scales(weight, *cost, args) for name, cost in costs.items()}


def relative_error(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    factor: Factor,
    scales: tuple[torch.Tensor, torch.Tensor],
    args: QuantizationArgs,
) -> float:
    """Of a module's output, after GPTQ's sweep with these scales."""

    def update(*tensors: torch.Tensor, i1: int) -> None:
        gptq_block_update(
            *tensors,
            scale=scales[0][None],
            zero_point=scales[1][None],
            global_scale=None,
            g_idx=groups,
            quant_args=args,
            i1=i1,
        )

    groups = torch.arange(len(hessian), dtype=torch.int) // args.group_size
    if factor.order is not None:
        groups = groups[factor.order][None]
    original = weight.float()
    quantized, _ = sweep(original[None].clone(), [factor], update, 128)
    difference = original - quantized[0]
    error = ((difference @ hessian) * difference).sum() / ((original @ hessian) * original).sum()
    return float(error)


@torch.no_grad()
def measure() -> dict[str, dict[str, float]]:
    """Ratio to min-max scales, by scheme and what scales are chosen for."""
    captured = capture()
    found = {}
    for title, (bits, size, symmetric) in SCHEMES.items():
        args = QuantizationArgs(
            num_bits=bits,
            strategy="group",
            group_size=size,
            symmetric=symmetric,
            actorder="weight",
        )
        logs: dict[str, list[float]] = {}
        for weight, hessian in captured.values():
            factor = factorize(hessian, 0.01, True)
            for name, scales in scales_of(weight, hessian, factor, args).items():
                error = relative_error(weight, hessian, factor, scales, args)
                logs.setdefault(name, []).append(math.log(error))
        base = logs["range (min-max)"]
        found[title] = {
            name: math.exp(statistics.fmean(a - b for a, b in zip(values, base, strict=True)))
            for name, values in logs.items()
        }
    return found


def main() -> None:
    """Measure, print a table, write the result."""
    found = measure()
    names = list(next(iter(found.values())))
    rows = [["scales chosen by", *found]]
    rows += [[name, *(f"{ratios[name]:.3f}" for ratios in found.values())] for name in names]
    print(markdown(rows))
    content = {"machine": record.machine(), "versions": record.versions(), "ratios": found}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
