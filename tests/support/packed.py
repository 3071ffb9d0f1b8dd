"""Writes tiny pack-quantized checkpoints by hand: bit strings, no compressor."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

WORD = 32
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 80,
    "intermediate_size": 104,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "num_hidden_layers": 2,
    "vocab_size": 202,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# Of 80 and 104 codes of 3 bits neither fills its words, and codes straddle them.
LINEARS = {
    "self_attn.q_proj": (80, 80),
    "self_attn.k_proj": (40, 80),
    "self_attn.v_proj": (40, 80),
    "self_attn.o_proj": (80, 80),
    "mlp.gate_proj": (104, 80),
    "mlp.up_proj": (104, 80),
    "mlp.down_proj": (80, 104),
}


def pack_row(codes, bits):
    """Words of one row of signed codes: one long integer, cut into 32 bits."""
    number = sum((int(code) + 2 ** (bits - 1)) << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // WORD)
    return np.frombuffer(number.to_bytes(4 * count, "little"), dtype="<i4")


def pack(codes, bits):
    """The same for every row of a matrix."""
    return torch.from_numpy(np.stack([pack_row(row, bits) for row in codes.tolist()]))


def weights_config(bits, symmetric=True, group=8):
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}


def quantization(weights, **extra):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, **extra}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"format": "pack-quantized", **group}},
    }


def write_packed(folder, bits, *, symmetric=True, group=8, shards=1, seed=0):
    """Write a checkpoint with random codes, some scales negative; its weights by module."""
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = _plain(draw)
    values = {}
    for layer in range(MODEL["num_hidden_layers"]):
        for name, size in LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            parts, values[module] = _linear(draw, bits, size, symmetric, group)
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    _write(folder, tensors, shards)
    config = {**MODEL, "quantization_config": quantization(weights_config(bits, symmetric, group))}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def write_int8(folder, *, symmetric=True, seed=0):
    """Write a W8A8 checkpoint with dynamic activations; (codes, scales) by module."""
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors, stored = _plain(draw), {}
    for layer in range(MODEL["num_hidden_layers"]):
        for name, size in LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            codes = torch.randint(-128, 128, size, generator=draw, dtype=torch.int8)
            scale = (torch.rand(size[0], 1, generator=draw) / 500).bfloat16()
            stored[module] = codes, scale
            tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
    _write(folder, tensors, 1)
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    form = {"format": "int-quantized", "input_activations": {**inputs, "symmetric": symmetric}}
    declared = quantization(weights_config(8, group=None), **form)
    (folder / "config.json").write_text(json.dumps({**MODEL, "quantization_config": declared}))
    return stored


def _linear(draw, bits, size, symmetric, group):
    out, width = size
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, size, generator=draw)
    groups = width // group if group else 1
    scale = (torch.randn(out, groups, generator=draw) / 20).bfloat16()
    zero = torch.randint(low, high, (out, groups), generator=draw) * (not symmetric)
    parts = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(size),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack(zero.T, bits).T.contiguous()
    each = width // groups
    spread = scale.repeat_interleave(each, 1)
    value = (codes - zero.repeat_interleave(each, 1)).bfloat16() * spread
    return parts, value


def _plain(draw):
    hidden, vocabulary = MODEL["hidden_size"], MODEL["vocab_size"]
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=draw),
        "lm_head.weight": torch.randn(vocabulary, hidden, generator=draw) / 4,
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(MODEL["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden)
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def _write(folder, tensors, shards):
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    # Every other tensor, so that the parts of a module lie in different files.
    for number in range(shards):
        names = sorted(tensors)[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
