"""2- and 3-bit codes in 4-bit containers: which modules, and what becomes of tensors and files.

A code of fewer bits is a 4-bit code too: with the same scales and zero points every value stays
the same, bit for bit. The quantize side does the same at the end of its run (`--container 4`).
"""

from copy import deepcopy
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from maca_llmc.common.defaults import CONTAINER_BITS
from maca_serve.common.errors import UserError
from maca_serve.doctor.schemes import scheme_finder
from maca_serve.formats.dequantization import PACKED
from maca_serve.formats.packing import unpack, unpack_columns
from maca_serve.formats.schemes import describe_scheme

_AS_IT_IS = "serve it as it is"


def check_widening(config: dict[str, Any], where: str) -> None:
    """Refuse a checkpoint that has nothing to widen, or codes stored in another way.

    Args:
        config: its config.json.
        where: the folder, for the message.

    Raises:
        UserError: anything but 2- and 3-bit weight-only groups, alone or beside others.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        raise UserError(f"{where}: not quantized (no quantization_config): {_AS_IT_IS}")
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise UserError(
            f"{where}: its quant_method is {method}, and repack reads compressed-tensors only:"
            " quantize the base again with maca-llmc quantize --container 4"
        )
    narrow = [group for group in _groups(quantization) if is_narrow(group)]
    if not narrow:
        raise UserError(
            f"{where}: {describe_scheme(config)}: it has no 2- or 3-bit weights to put into"
            f" {CONTAINER_BITS}-bit containers: {_AS_IT_IS}"
        )
    for group in narrow:
        stored = group.get("format") or quantization.get("format")
        if stored != PACKED:
            raise UserError(
                f"{where}: its codes are stored as {stored}, not as {PACKED}: quantize again with"
                f" `format: {PACKED}` in the config group"
            )
        if group.get("input_activations"):
            raise UserError(
                f"{where}: {describe_scheme(config)} quantizes activations too, which 4-bit"
                " weight-only kernels do not: quantize again without input_activations"
            )


def is_narrow(group: dict[str, Any]) -> bool:
    """Whether a config group has integer weights of fewer bits than the container."""
    weights = group.get("weights") or {}
    return weights.get("type", "int") == "int" and weights.get("num_bits", 16) < CONTAINER_BITS


def widen_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the widened checkpoint."""
    wide = deepcopy(config)
    for group in filter(is_narrow, _groups(wide["quantization_config"])):
        group["weights"]["num_bits"] = CONTAINER_BITS
    return wide


def widen_record(record: dict[str, Any]) -> dict[str, Any]:
    """The run record of the widened checkpoint, in the quantize side's words."""
    wide = {**record, "container_bits": CONTAINER_BITS}
    if scheme := record.get("scheme"):
        wide["scheme"] = f"{scheme}, in {CONTAINER_BITS}-bit containers"
    return wide


class Widener:
    """Widens tensors one by one, by name.

    Attributes:
        count: how many modules were widened.
    """

    def __init__(self, quantization: dict[str, Any], sizes: dict[str, tuple[int, int]]) -> None:
        """Prepare.

        Args:
            quantization: the `quantization_config` before it was widened.
            sizes: (output features, input features) of every module with codes.
        """
        self._scheme_of = scheme_finder(quantization)
        self._sizes = sizes
        self.count = 0

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the widened checkpoint stores it; the same one where nothing changes."""
        module, _, suffix = name.rpartition(".")
        if suffix not in ("weight_packed", "weight_zero_point"):
            return tensor
        scheme = self._scheme_of(module) if self._scheme_of else None
        if scheme is None or scheme.kind != "int" or scheme.bits >= CONTAINER_BITS:
            return tensor
        out, width = self._sizes[module]
        # compressed-tensors of every version packs 4 bits alike: eight codes to a word.
        if suffix == "weight_packed":
            self.count += 1
            return pack_to_int32(unpack(tensor, scheme.bits, width), CONTAINER_BITS)
        zero_points = unpack_columns(tensor, scheme.bits, out)
        return pack_to_int32(zero_points, CONTAINER_BITS, packed_dim=0).contiguous()


def _groups(quantization: dict[str, Any]) -> list[dict[str, Any]]:
    return list((quantization.get("config_groups") or {}).values())
