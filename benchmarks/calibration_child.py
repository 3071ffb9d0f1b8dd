"""One calibration, in a process of its own: stock GPTQ or ours, timed by phase. Prints JSON.

Started by ``calibration.py``. Stock runs never import ``maca_llmc``, which would give them its
compiled sweep.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize
from llmcompressor.modifiers.gptq import base as gptq_base
from transformers import AutoConfig, AutoModelForCausalLM

SEED = 0
SECONDS: Counter[str] = Counter()
FLOPS: Counter[str] = Counter()
TOKENIZER: Any = object()
"""The data are tokens already, but oneshot wants one."""


def timed(owner, name: str, phase: str) -> None:
    """Count the wall seconds of a function under ``phase``."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            SECONDS[phase] += time.perf_counter() - start

    setattr(owner, name, wrapped)


def build(case, folder):
    """The case's model: the embedded one in bfloat16, or a random one of a shape."""
    if case["model"].startswith("/"):
        model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.bfloat16)
    else:
        config = AutoConfig.for_model(case["model"], **case["shape"])
        config.save_pretrained(folder)
        config._name_or_path = str(folder)  # oneshot looks it up
        torch.manual_seed(SEED)
        torch.set_default_dtype(getattr(torch, case.get("dtype", "bfloat16")))
        model = random_model(config)
        torch.set_default_dtype(torch.float32)
    if case.get("layers"):
        del model.model.layers[case["layers"] :]
        model.config.num_hidden_layers = case["layers"]
    return model.eval()


def random_model(config):
    """A model of random weights, its experts separate Linears as llm-compressor calibrates them."""
    model = AutoModelForCausalLM.from_config(config)
    linearize_moe(model)
    return model


def useful_flops(model, case) -> tuple[float, float]:
    """Of the passes through the layers, and of the Hessians: a triangle is counted once.

    Passes: two a layer, but one for the last; two FLOPs a weight and token, and what causal
    attention needs. Hessians: one for each distinct input, ``tokens * width * (width + 1)``.
    """
    config, lengths = model.config, case["lengths"]
    layers, tokens = len(model.model.layers), sum(lengths)
    weights = sum(m.weight.numel() for m in linears(model.model.layers[0]))
    attention = sum(
        2 * length * (length + 1) * config.num_attention_heads * config.head_dim
        for length in lengths
    )
    inputs = {}
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("mlp.gate"):
            inputs[shared_input(name)] = module.in_features
    hessians = sum(tokens * width * (width + 1) for width in inputs.values())
    return (2 * layers - 1) * (2 * weights * tokens + attention), layers * hessians


def linears(layer):
    """The Linear modules of a layer."""
    return [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]


def shared_input(name: str) -> str:
    """One name for all modules of one input."""
    stem, _, kind = name.rpartition(".")
    if kind in ("q_proj", "k_proj", "v_proj"):
        return "attention"
    return "mlp" if kind in ("gate_proj", "up_proj") else f"{stem}.{kind}"


def count_flops(owner, name: str, flops) -> None:
    """Count what a function that adds to a Hessian really multiplies."""
    original = getattr(owner, name)

    def counted(*args):
        FLOPS["hessian"] += flops(*args)
        return original(*args)

    setattr(owner, name, counted)


def only_accumulate(owner) -> None:
    """Leave the solve out, in cases about the Hessians."""

    def forget(self):
        if hasattr(self, "_inputs"):
            self._inputs.take()
        self._done = set(self._module_names) if hasattr(self, "_inputs") else None
        self._hessians.clear()
        self._num_samples.clear()

    owner.compress_modules = forget


def batches(case, vocabulary: int):
    """Random tokens in the case's lengths, those of one length together as our loader has them."""
    generator = torch.Generator().manual_seed(SEED)
    sequences = [
        torch.randint(10, vocabulary, (length,), generator=generator) for length in case["lengths"]
    ]
    if case["method"] == "stock":
        groups = [[index] for index in range(len(sequences))]
    else:
        from maca_llmc.data.calibration import batches_of_equal_length

        groups = batches_of_equal_length(case["lengths"], case["batch_tokens"])
    rows = [torch.stack([sequences[index] for index in group]) for group in groups]
    return torch.utils.data.DataLoader(
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows],
        batch_size=None,
        shuffle=False,
    )


def reset_peak() -> int:
    """Forget the peak of resident memory; what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(key: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def run_stock(model, data, case):
    """Stock llm-compressor: its modifier, its sequential pipeline."""
    count_flops(
        gptq_base, "accumulate_hessian", lambda x, m, h, n: 2 * (x.numel() // len(h)) * len(h) ** 2
    )
    timed(gptq_base, "accumulate_hessian", "hessian")
    timed(gptq_quantize, "factorize_hessian", "factorise")
    timed(gptq_base, "quantize_weight", "factorise and sweep")
    if case.get("accumulate_only"):
        only_accumulate(GPTQModifier)
    timed(GPTQModifier, "compress_modules", "compress")
    recipe = GPTQModifier(**case["scheme"])
    return lambda: oneshot(model=model, dataset=data, recipe=recipe, processor=TOKENIZER)


def run_ours(model, data, case, folder):
    """MaCa through the layer pipeline, keeping finished layers on disk as the command does."""
    import maca_llmc.modifier as modifier_module
    from maca_llmc import MaCaModifier
    from maca_llmc.calibrate import hidden_states, pipeline
    from maca_llmc.gptq import hessian, losses, stacks
    from maca_llmc.run.state import RunState, layer_tensors

    class Keeper:
        def __init__(self):
            self.state = RunState(folder / "out", {})

        finished = 0

        def keep(self, layer):
            self.state.save_layer(layer_tensors(layer), {})

    count_flops(hessian, "_add_product", lambda t, left, right, *_: 2 * t.numel() * len(right))
    timed(hessian, "add_rows", "hessian")
    timed(modifier_module, "factorize", "factorise")
    timed(stacks, "sweep", "sweep")
    timed(stacks, "row_energies", "losses")
    if case.get("accumulate_only"):
        only_accumulate(MaCaModifier)
    timed(MaCaModifier, "compress_modules", "compress")
    timed(Keeper, "keep", "save")
    warm_up_compiled_sweep()
    recipe = MaCaModifier(
        **case["scheme"],
        **{"first_token_weight": 1.0, "hessian_scales": False, **case.get("fields", {})},
    )
    hidden = hidden_states.HiddenStates(case.get("cache_bytes"), folder / "spill")

    def run():
        with (
            losses.recorded_losses(lambda module, loss: None),
            pipeline.using(pipeline.Resources(Keeper(), hidden)),
        ):
            oneshot(
                model=model,
                dataset=data,
                recipe=recipe,
                processor=TOKENIZER,
                pipeline=pipeline.NAME,
            )

    return run


def warm_up_compiled_sweep() -> None:
    """Compile or load the sweep before the clock starts, as Triton kernels would be cached too."""
    from maca_llmc.gptq.cpu_sweep import sweep_block

    work = torch.ones(2, 4)
    sweep_block(work, torch.eye(4), work.clone(), None, (-8, 7), work.clone(), work.clone())


def main() -> None:
    """Run the case given as JSON on standard input."""
    case = json.loads(sys.stdin.read())
    torch.set_num_threads(case["threads"])
    with tempfile.TemporaryDirectory(dir=case.get("disk")) as name:
        folder = Path(name)
        model = build(case, folder)
        data = batches(case, model.config.vocab_size)
        if case["device"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if case["method"] == "stock":
            run = run_stock(model, data, case)
        else:
            run = run_ours(model, data, case, folder)
        before = reset_peak()
        cpu = time.process_time()
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            run()
        wall = time.perf_counter() - start
    seconds = dict(SECONDS)
    if "factorise and sweep" in seconds:
        seconds["sweep"] = seconds.pop("factorise and sweep") - seconds["factorise"]
    forward_flops, hessian_flops = useful_flops(model, case)
    compress = seconds.pop("compress")
    seconds["other solve"] = compress - sum(
        seconds.get(phase, 0.0) for phase in ("factorise", "sweep", "losses")
    )
    # what is neither: both passes, and what the pipeline does around them
    seconds["forward"] = wall - compress - seconds["hessian"] - seconds.get("save", 0.0)
    print(
        json.dumps(
            {
                "wall": wall,
                "cpu": time.process_time() - cpu,
                "seconds": seconds,
                "forward_flops": forward_flops,
                "hessian_flops": hessian_flops,
                "hessian_flops_done": FLOPS["hessian"],
                "rss_above_weights": memory("VmHWM") - before,
                "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "device_bytes": (
                    torch.cuda.max_memory_allocated() if case["device"] == "cuda" else None
                ),
                "load_average": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
