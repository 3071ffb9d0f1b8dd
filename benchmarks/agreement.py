"""Are the codes those of stock GPTQ? Layer by layer on the same inputs, and end to end.

    .venv/bin/python benchmarks/agreement.py         # writes benchmarks/results/agreement.json

MaCa with ``length_exponent: 0`` and ``hessian_scales: false`` calibrates the embedded model (W4,
group 64). From the very inputs it sees, stock's Hessians are accumulated beside its own, and every
module is solved by stock's ``quantize_weight`` too, alone: once from our Hessian, which must give
the same codes, and once from stock's, where sums may differ in the last bit. There each row's first
differing column (in the order of the sweep) is looked at: how far, in float64, its weight was from
the boundary between two codes. Then stock GPTQ quantizes the model, once through the same pipeline
(the same attention, so what differs is the solver alone) and once through its own (eager
attention), and the models are compared: of rounding differences that meet a boundary, later layers
make more.
"""

import json
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
from transformers import AutoModelForCausalLM, AutoTokenizer

from maca_llmc import MaCaModifier, build_calibration_set
from maca_llmc.calibrate import pipeline
from maca_llmc.common import record
from maca_llmc.model.smollm2 import embedded_model

RESULT = Path(__file__).parent / "results" / "agreement.json"
THREADS = 2
LENGTH = 512
SEQUENCES = 16
GROUP = 64
SCHEME = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
        }
    },
    "ignore": ["lm_head"],
}
WINDOWS, WINDOW = 8, 512


AS_STOCK = {"length_exponent": 0.0, "first_token_weight": 1.0, "hessian_scales": False}


class Compared(MaCaModifier):
    """MaCa that solves each module by stock's solver too, and counts where codes differ."""

    def calibrate_module(self, module, args, output):
        """Accumulate stock's Hessian of the same input."""
        beside = self.__dict__.setdefault("beside", {})
        if module not in beside:
            beside[module] = make_empty_hessian(module), torch.zeros(())
        beside[module] = accumulate_hessian(args[0], module, *beside[module])
        super().calibrate_module(module, args, output)

    def _solve(self, stacks, factors, hessians):
        modules = [module for stack in stacks for module in stack]
        hessian_of = {
            module: hessian
            for stack, hessian in zip(stacks, hessians, strict=True)
            for module in stack
        }
        before = {module: module.weight.detach().float().clone() for module in modules}
        qparams = {module: module.weight_observer.get_qparams() for module in modules}
        for module in modules:
            module.weight_observer(module.weight)  # reading it has emptied it
        super()._solve(stacks, factors, hessians)
        for module in modules:
            own = hessian_of[module]
            stock, count = self.__dict__["beside"].pop(module)
            stock = stock / count
            self.__dict__.setdefault("found", []).append(
                {
                    "module": self._module_names[module],
                    "hessian_error": float((own - stock).norm() / stock.norm()),
                    "codes": module.weight.numel(),
                    **compare(module, before[module], qparams[module], own, stock),
                }
            )


def compare(module, weight, qparams, own, stock) -> dict:
    """Codes that differ from stock's solver with our Hessian, and with stock's."""
    args = module.quantization_scheme.weights
    ours = module.weight.detach()

    def solve(hessian):
        return quantize_weight(
            weights=weight[None].clone(),
            hessians=hessian[None].clone(),
            scale=qparams["scale"][None],
            zero_point=qparams["zero_point"][None],
            global_scale=None,
            quant_args=args,
        )[0][0].to(ours.dtype)

    same_hessian, other = solve(own), solve(stock)
    distances = [
        boundary_distance(row, weight, qparams["scale"], ours, other, stock)
        for row in (ours != other).any(dim=1).nonzero().flatten().tolist()
    ]
    return {
        "differ_given_the_same_hessian": int((ours != same_hessian).sum()),
        "differ_given_stock_hessian": int((ours != other).sum()),
        "rows_that_differ": len(distances),
        "furthest_from_a_boundary": max(distances, default=0.0),
    }


def boundary_distance(row, weight, scale, ours, other, hessian) -> float:
    """Steps between a row's first differing weight and the nearest boundary, in float64."""
    hessian = hessian.double().clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    left, codes = weight[row, order].double().clone(), ours[row, order].double()
    differs = (ours[row, order] != other[row, order]).nonzero()[0, 0]
    for column in range(int(differs)):
        error = (left[column] - codes[column]) / upper[column, column]
        left -= error * upper[column]
    step = scale[row, order[differs] // GROUP].double()
    position = float(left[differs] / step)
    return abs(position - round(position - 0.5) - 0.5)


def logits(model, tokens) -> torch.Tensor:
    """Log-probabilities of ``[windows, window]`` tokens, ``[tokens, vocabulary]``."""
    with torch.no_grad():
        return torch.cat([model(row[None]).logits[0].float().log_softmax(-1) for row in tokens])


def load():
    """The embedded model."""
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16).eval()


def main() -> None:
    """Run both, print a summary and write the result file."""
    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    needed = SEQUENCES * LENGTH + WINDOWS * WINDOW
    built = build_calibration_set(tokenizer, scales=(LENGTH,), tokens=needed)
    held_out = torch.stack(built.sequences[SEQUENCES : SEQUENCES + WINDOWS])
    data = torch.utils.data.DataLoader(
        [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
            for row in built.sequences[:SEQUENCES]
        ],
        batch_size=None,
    )
    base, ours, same_pipeline, stock = load(), load(), load(), load()
    modifier = Compared(**SCHEME, **AS_STOCK)
    oneshot(model=ours, dataset=data, recipe=modifier, processor=tokenizer, pipeline=pipeline.NAME)
    oneshot(
        model=same_pipeline,
        dataset=data,
        recipe=GPTQModifier(**SCHEME),
        processor=tokenizer,
        pipeline=pipeline.NAME,
    )
    oneshot(model=stock, dataset=data, recipe=GPTQModifier(**SCHEME), processor=tokenizer)
    scores = [logits(model, held_out) for model in (base, ours, same_pipeline, stock)]

    def divergence(one, other):
        return float((one.exp() * (one - other)).sum(-1).mean())

    modules = modifier.__dict__["found"]
    result = {
        "machine": record.machine(),
        "versions": record.versions(),
        "codes": sum(entry["codes"] for entry in modules),
        "differ_given_the_same_hessian": sum(
            entry["differ_given_the_same_hessian"] for entry in modules
        ),
        "differ_given_stock_hessian": sum(entry["differ_given_stock_hessian"] for entry in modules),
        "rows_that_differ": sum(entry["rows_that_differ"] for entry in modules),
        "furthest_from_a_boundary_in_steps": max(
            entry["furthest_from_a_boundary"] for entry in modules
        ),
        "largest_hessian_error": max(entry["hessian_error"] for entry in modules),
        "kl": {
            "base to ours": divergence(scores[0], scores[1]),
            "base to stock in our pipeline": divergence(scores[0], scores[2]),
            "base to stock": divergence(scores[0], scores[3]),
            "stock in our pipeline to ours": divergence(scores[2], scores[1]),
            "stock to stock in our pipeline": divergence(scores[3], scores[2]),
            "stock to ours": divergence(scores[3], scores[1]),
        },
        "modules": modules,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in result if key != "modules"}, indent=1))


if __name__ == "__main__":
    main()
