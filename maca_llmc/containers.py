"""Store 2- and 3-bit codes in 4-bit containers: same values, more kernels."""

from copy import deepcopy

import torch

from maca_llmc.errors import UserError

CONTAINER_BITS = 4


def widen_containers(model: torch.nn.Module) -> int:
    """Have a quantized model saved with 4-bit codes where its weights have fewer bits.

    A 2- or 3-bit code is a 4-bit code too: scales, zero points and so the values stay the same bit
    for bit. Call it after quantization, before saving.

    :return: how many modules were widened
    :raises UserError: when no module has fewer than 4 bits
    """
    widened = {}
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None or scheme.weights.num_bits >= CONTAINER_BITS:
            continue
        if id(scheme) not in widened:
            wide = deepcopy(scheme)
            wide.weights.num_bits = CONTAINER_BITS
            widened[id(scheme)] = (scheme, wide)  # the old one is kept so that its id stays taken
        module.quantization_scheme = widened[id(scheme)][1]
    if not widened:
        raise UserError(
            f"--container {CONTAINER_BITS} is for 2- and 3-bit weights and this recipe has none: "
            "drop it"
        )
    return sum(hasattr(module, "quantization_scheme") for module in model.modules())
