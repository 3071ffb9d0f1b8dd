"""Checkpoints of a large model's shape with random weights, for speed alone.

Speed depends on shapes, types and kernels, not on values, so nothing is quantized: codes are random
and scales give weights the spread of a fresh model. Each tensor's type and shape come from the
tables by which ``maca-serve doctor`` judges checkpoints.
"""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from maca_serve.doctor.layouts import expected
from maca_serve.doctor.schemes import scheme_finder
from safetensors.torch import save_file
from shapes import LLAMA_8B
from transformers import AutoTokenizer

# Names of compressed-tensors' presets, and bits where they are others than the preset's.
SCHEMES = {
    "w8a8": ("W8A8", "int-quantized", None),
    "fp8": ("FP8_DYNAMIC", "float-quantized", None),
    "w4a16": ("W4A16", "pack-quantized", None),
    "w3a16": ("W4A16", "pack-quantized", 3),
    "w2a16": ("W4A16", "pack-quantized", 2),
}
SPREAD = 0.02  # standard deviation of weights
TYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}


def make(folder: Path, scheme: str, layers: int, tokenizer: Path, shape: dict = LLAMA_8B) -> Path:
    """Write a checkpoint; `bf16` or one of SCHEMES. A folder that is there already is kept.

    The vocabulary is that of the tokenizer. The embedding is tied, which keeps a model of few
    layers near the proportions of a large one.
    """
    if folder.is_dir():
        return folder
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(beside)
    config = _config(scheme, layers, len(words), words.eos_token_id, shape)
    (beside / "config.json").write_text(json.dumps(config, indent=1))
    torch.manual_seed(0)
    _write(beside, config)
    beside.rename(folder)
    return folder


def _config(scheme: str, layers: int, vocabulary: int, end: int, shape: dict) -> dict:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "bos_token_id": end,
        "eos_token_id": end,
        **shape,
    }
    if scheme != "bf16":
        config["quantization_config"] = _quantization(*SCHEMES[scheme])
    return config


def _quantization(preset: str, layout: str, bits: int | None) -> dict:
    group = preset_name_to_scheme(preset, ["Linear"])
    group.format = layout
    if bits:
        group.weights.num_bits = bits
    settings = {"format": layout, "quantization_status": "compressed", "ignore": ["lm_head"]}
    made = QuantizationConfig(config_groups={"group_0": group}, **settings)
    return made.model_dump(mode="json")


def _write(folder: Path, config: dict) -> None:
    """A file per layer, one for what is outside, and the index."""
    width = config["hidden_size"]
    outside = {
        "model.embed_tokens.weight": _normal(config["vocab_size"], width),
        "model.norm.weight": _ones(width),
    }
    weight_map = _save(folder, "outside", outside)
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        tensors = {
            f"{prefix}input_layernorm.weight": _ones(width),
            f"{prefix}post_attention_layernorm.weight": _ones(width),
        }
        for module, (out, inputs) in _modules(config).items():
            made = _module(config, f"{prefix}{module}", out, inputs)
            tensors |= {f"{prefix}{module}.{suffix}": tensor for suffix, tensor in made.items()}
        weight_map |= _save(folder, f"layer-{number:02}", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save(folder: Path, name: str, tensors: dict) -> dict[str, str]:
    file = f"{name}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)


def _modules(config: dict) -> dict[str, tuple[int, int]]:
    """(output features, input features) of a layer's Linears."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    shared = config["num_key_value_heads"] * config["head_dim"]
    return {
        "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (shared, width),
        "self_attn.v_proj": (shared, width),
        "self_attn.o_proj": (width, heads),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def _module(config: dict, name: str, out: int, inputs: int) -> dict[str, torch.Tensor]:
    quantization = config.get("quantization_config")
    if quantization is None:
        return {"weight": _normal(out, inputs)}
    scheme = scheme_finder(quantization)(name)
    # Evenly drawn codes of b bits have a standard deviation of 2^b / sqrt(12).
    scale = SPREAD if scheme.kind == "float" else SPREAD * 12**0.5 / 2**scheme.bits
    tensors = {}
    for suffix, tensor in expected(scheme, out, inputs).items():
        if suffix == "weight_shape":
            tensors[suffix] = torch.tensor([out, inputs])
        elif suffix == "weight_scale":
            tensors[suffix] = torch.full(tensor.shapes[0], scale, dtype=torch.bfloat16)
        elif tensor.required:
            tensors[suffix] = _codes(tensor.shapes[0], TYPES[tensor.dtypes[0]])
    return tensors


def _codes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, dtype=dtype)


def _normal(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, SPREAD)


def _ones(width: int) -> torch.Tensor:
    return torch.ones(width, dtype=torch.bfloat16)
