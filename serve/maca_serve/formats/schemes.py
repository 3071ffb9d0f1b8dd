"""One line that says how a checkpoint's weights are stored, read from its config."""

from typing import Any

# Formats whose scales are not what the arguments of a float scheme alone would say.
_NAMES = {
    "mxfp4-pack-quantized": "MXFP4 (scales are powers of two)",
    "mxfp8-quantized": "MXFP8 (scales are powers of two)",
    "nvfp4-pack-quantized": "NVFP4",
}


def describe_scheme(config: dict[str, Any]) -> str:
    """Describe `quantization_config`, e.g. `W4A16 int, group 64, symmetric`.

    Args:
        config: a model's config.json.

    Returns:
        One description per config group, joined by ` + `; the dtype (`BF16`) without quantization.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return describe_dtype(config)
    if quantization.get("quant_method") != "compressed-tensors":
        return _describe_other(quantization)
    groups = quantization.get("config_groups") or {}
    default = quantization.get("format")
    found = [_describe_group(g, default) for g in groups.values() if isinstance(g, dict)]
    return " + ".join(dict.fromkeys(found)) or "compressed-tensors without groups"


def describe_dtype(config: dict[str, Any]) -> str:
    """The dtype of the weights, e.g. `BF16`, also of a config that nests its text model."""
    text = config.get("text_config") or {}
    names = [config.get("dtype"), config.get("torch_dtype"), text.get("dtype")]
    return shorten_dtype(next((name for name in names if name), "unknown dtype"))


def shorten_dtype(name: str) -> str:
    """`BF16` of `bfloat16`."""
    return {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}.get(name, str(name))


def _describe_group(group: dict[str, Any], default_format: str | None) -> str:
    form = str(group.get("format") or default_format)
    weights = group.get("weights") or {}
    activations = group.get("input_activations") or {}
    parts = [
        f"W{weights.get('num_bits', 16)}A{activations.get('num_bits', 16)}"
        f" {_NAMES.get(form) or weights.get('type', 'int')}",
        _describe_granularity(weights),
        "symmetric" if weights.get("symmetric", True) else "asymmetric",
    ]
    if activations:
        how = "dynamic" if activations.get("dynamic") else "static"
        parts.append(f"{how} activations per {activations.get('strategy', 'tensor')}")
    return ", ".join(parts)


def _describe_granularity(weights: dict[str, Any]) -> str:
    if weights.get("group_size") and weights["group_size"] > 0:
        return f"group {weights['group_size']}"
    return str(weights.get("strategy", "tensor"))


def _describe_other(quantization: dict[str, Any]) -> str:
    method = quantization.get("quant_method", "unknown method")
    bits = quantization.get("bits") or quantization.get("w_bit")
    group = quantization.get("group_size") or quantization.get("q_group_size")
    parts = [f"{method} {bits}-bit" if bits else str(method), f"group {group}" if group else ""]
    return ", ".join(part for part in parts if part)
