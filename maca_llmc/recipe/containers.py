"""Store 2- and 3-bit codes in 4-bit containers: same values, more kernels."""

from collections.abc import Iterable
from copy import deepcopy

import torch
from compressed_tensors.quantization import QuantizationScheme

from maca_llmc.common.defaults import CONTAINER_BITS
from maca_llmc.common.errors import UserError


def check_container(schemes: Iterable[QuantizationScheme]) -> None:
    """Refuse a recipe that has nothing to widen.

    :raises UserError: when no scheme has weights of fewer than 4 bits
    """
    if not any(_is_narrow(scheme) for scheme in schemes):
        raise UserError(
            f"--container {CONTAINER_BITS} is for 2- and 3-bit weights and this recipe has none: "
            "drop it"
        )


def widen_containers(model: torch.nn.Module) -> int:
    """Have a quantized model saved with 4-bit codes where its weights have fewer bits.

    A 2- or 3-bit code is a 4-bit code too: scales, zero points and so the values stay the same bit
    for bit. Call it after quantization, before saving.

    :return: how many modules were widened
    """
    wide: dict[int, QuantizationScheme] = {}
    narrow: list[QuantizationScheme] = []  # kept, so that their ids stay taken
    count = 0
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or not _is_narrow(scheme):
            continue
        if id(scheme) not in wide:
            wide[id(scheme)] = deepcopy(scheme)
            wide[id(scheme)].weights.num_bits = CONTAINER_BITS
            narrow.append(scheme)
        module.quantization_scheme = wide[id(scheme)]
        count += 1
    return count


def _is_narrow(scheme: QuantizationScheme) -> bool:
    return scheme.weights is not None and scheme.weights.num_bits < CONTAINER_BITS
