"""Checkpoints to hold the doctor to: many schemes, a few shapes, tiny random weights.

    .venv/bin/python benchmarks/doctor_cases.py FOLDER [CASE ...]  # in the quantize environment

Written by llm-compressor's own QuantizationModifier (round to nearest), so that formats are those
that users have; those of GPTQ, AWQ and AutoRound are made here, with random codes.
``doctor_agreement.py`` runs this.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from maca_llmc.model import loading

EVEN = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
ODD = {"hidden_size": 240, "intermediate_size": 496, "head_dim": 64}
"""Widths that 16 divides and 32 does not."""
HEADS = {**EVEN, "head_dim": 60}
"""A head size that 32 does not divide."""
MOE = {
    **EVEN,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MIXED = {**MOE, "mlp_only_layers": [0]}
"""The first layer has no experts."""
ODD_MOE = {**MOE, "moe_intermediate_size": 144}


def weights(bits: int, group: int | None, symmetric: bool = True, **activations: dict) -> dict:
    """Fields of the modifier for integer weights."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    scheme = {"targets": ["Linear"], **activations}
    scheme["weights"] = {"num_bits": bits, "symmetric": symmetric, **strategy}
    return {"config_groups": {"group_0": scheme}}


TOKENWISE = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
CASES = {
    "w4a16-g32": (weights(4, 32), EVEN),
    "w4a16-g16": (weights(4, 16), EVEN),
    "w4a16-channel": (weights(4, None), EVEN),
    "w4a16-asymmetric-g64": (weights(4, 64, symmetric=False), EVEN),
    "w4a16-channel-odd": (weights(4, None), ODD),
    "w8a8": ({"scheme": "W8A8"}, EVEN),
    "w8a8-odd": ({"scheme": "W8A8"}, ODD),
    "w4a8-g32": (weights(4, 32, input_activations=TOKENWISE), EVEN),
    "fp8-dynamic": ({"scheme": "FP8_DYNAMIC"}, EVEN),
    "fp8-static": ({"scheme": "FP8"}, EVEN),
    "fp8-block": ({"scheme": "FP8_BLOCK"}, EVEN),
    "w8a16-channel": (weights(8, None), EVEN),
    "w3a16-g64": (weights(3, 64), EVEN),
    "w2a16-g64": (weights(2, 64), EVEN),
    "nvfp4": ({"scheme": "NVFP4"}, EVEN),
    "mxfp4a16": ({"scheme": "MXFP4A16"}, EVEN),
    "heads-of-60": ({"scheme": "W8A8"}, HEADS),
    "moe-w4a16-g128": (weights(4, 128), MOE),
    "moe-w4a16-g64-mixed": (weights(4, 64), MIXED),
    "moe-w4a16-g32": (weights(4, 32), MOE),
    "moe-w4a16-channel": (weights(4, None), MOE),
    "moe-w4a16-asymmetric-g64": (weights(4, 64, symmetric=False), MOE),
    "moe-w4a16-g16-odd": (weights(4, 16), ODD_MOE),
    "moe-w8a8": ({"scheme": "W8A8"}, MOE),
    "moe-w8a8-odd": ({"scheme": "W8A8"}, ODD_MOE),
    "moe-w4a8-g32": (weights(4, 32, input_activations=TOKENWISE), MOE),
    "moe-fp8-dynamic": ({"scheme": "FP8_DYNAMIC"}, MOE),
    "moe-fp8-block": ({"scheme": "FP8_BLOCK"}, MOE),
}


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 64,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}
SIXTEEN = {"bits": 16, "data_type": "float"}
OTHERS = {
    # name: the quantization_config, and which Linears stay as they are
    "gptq-w4-g64": (GPTQ, None),
    "gptq-w4-g64-asymmetric": (GPTQ | {"sym": False}, None),
    "gptq-w4-g64-ordered": (GPTQ | {"desc_act": True}, None),
    "gptq-w3-g64": (GPTQ | {"bits": 3}, None),
    "gptq-w8-g64": (GPTQ | {"bits": 8}, None),
    "gptq-w4-g64-but-o": (GPTQ | {"dynamic": {r"-:.*o_proj.*": {}}}, "o_proj"),
    "gptq-w4-g64-but-k": (GPTQ | {"dynamic": {r"-:.*k_proj.*": {}}}, "k_proj"),
    "awq-g64": (AWQ, None),
    "awq-g64-but-down": (AWQ | {"modules_to_not_convert": ["down_proj"]}, "down_proj"),
    "autoround-gptq": (ROUND, None),
    "autoround-awq": (ROUND | {"packing_format": "auto_round:auto_awq", "sym": False}, None),
    "autoround-gptq-but-o": (
        ROUND | {"extra_config": {f"model.layers.{n}.self_attn.o_proj": SIXTEEN for n in range(2)}},
        "o_proj",
    ),
}


def make_other(folder: Path, quantization: dict, plain: str | None) -> None:
    """One checkpoint in the format of another tool, with random codes."""
    model, tokenizer = unquantized(EVEN)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        if plain is None or plain not in name:
            out, width = tensors.pop(name).shape
            parts = packed(quantization, out, width)
            tensors |= {name.replace("weight", part): value for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def packed(quantization: dict, out: int, width: int) -> dict[str, torch.Tensor]:
    """Tensors of a Linear: AutoAWQ packs codes along outputs, AutoGPTQ along inputs."""
    bits, groups = quantization["bits"], width // quantization["group_size"]
    awq = "awq" in quantization["quant_method"] + quantization.get("packing_format", "")
    codes = (width, out * bits // 32) if awq else (width * bits // 32, out)
    parts = {
        "qweight": words(*codes),
        "qzeros": words(groups, out * bits // 32),
        "scales": torch.full((groups, out), 0.01, dtype=torch.float16),
    }
    if not awq:
        parts["g_idx"] = torch.arange(width, dtype=torch.int32) // quantization["group_size"]
    return parts


def words(rows: int, columns: int) -> torch.Tensor:
    """Random int32 ``[rows, columns]``."""
    return torch.randint(-(2**31), 2**31, (rows, columns)).int()


def unquantized(shape: dict) -> tuple[Any, Any]:
    """A model of random weights, and the embedded model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(loading.resolve_model("smollm2-135m-instruct"))
    common = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = AutoConfig.for_model(**common | shape)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tokenizer


def make(folder: Path, fields: dict, shape: dict) -> None:
    """One checkpoint of llm-compressor."""
    model, tokenizer = unquantized(shape)
    base = folder.parent / ".base"  # llm-compressor copies what stands beside a model's weights
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ids = torch.randint(0, len(tokenizer), (4, 64))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=DataLoader(rows, batch_size=None),
        recipe=QuantizationModifier(ignore=["lm_head", r"re:.*mlp\.gate$"], **fields),
        output_dir=str(folder),
    )


def main() -> None:
    """Make what is missing of all, or of those named."""
    folder, names = Path(sys.argv[1]), sys.argv[2:] or [*CASES, *OTHERS]
    for name in tqdm(names, desc="checkpoints"):
        if (folder / name / "config.json").is_file():
            continue
        if name in OTHERS:
            make_other(folder / name, *OTHERS[name])
        else:
            make(folder / name, *CASES[name])


if __name__ == "__main__":
    main()
