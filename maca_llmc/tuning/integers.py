"""Integer weights of a compressed-tensors checkpoint: codes, scales and zero points.

A weight is ``W = (q - z) s`` with codes ``q`` ``[rows, columns]`` and, for each row and group of
columns, a scale ``s`` and maybe a zero point ``z``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class IntegerWeight:
    """The quantized weight of one Linear.

    :param codes: int8 ``[rows, columns]``
    :param scale: as stored, ``[rows, groups]``; may be negative
    :param zero_point: int8 ``[rows, groups]``, None when symmetric
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code in use: 3-bit codes in 4-bit containers stay 3-bit."""
        return int(self.codes.min()), int(self.codes.max())

    @property
    def groups(self) -> int:
        """Groups of columns."""
        return self.scale.shape[1]

    def by_group(self, columns: torch.Tensor) -> torch.Tensor:
        """View ``[rows, columns]`` as ``[rows, groups, columns of a group]``."""
        return columns.view(columns.shape[0], self.groups, -1)

    def levels(self, codes: torch.Tensor) -> torch.Tensor:
        """``q - z`` in float32, ``[rows, groups, columns of a group]``."""
        levels = self.by_group(codes).float()
        return levels if self.zero_point is None else levels - self.zero_point.unsqueeze(-1)

    def stored(self, log_factor: torch.Tensor) -> torch.Tensor:
        """``s exp(log_factor)`` as it can be stored: in the scale's dtype, its sign kept, not 0."""
        scaled = (self.scale.float() * log_factor.exp()).to(self.scale.dtype)
        return torch.where(scaled == 0, self.scale, scaled)

    def dequantized(self, log_factor: torch.Tensor | None = None) -> torch.Tensor:
        """The weight in float32 ``[rows, columns]``.

        :param log_factor: what each scale is multiplied by, as a logarithm ``[rows, groups]``
        """
        scale = self.scale if log_factor is None else self.stored(log_factor)
        return (self.levels(self.codes) * scale.float().unsqueeze(-1)).flatten(1)

    def scale_gradient(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of ``log_factor``: the sum of ``dW * W`` over each group, ``[rows, groups]``."""
        return (self.by_group(gradient) * self.by_group(weight)).sum(-1)

    def to(self, device: torch.device) -> "IntegerWeight":
        """The same on a device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return IntegerWeight(self.codes.to(device), self.scale.to(device), zero_point)

    def with_scale(self, log_factor: torch.Tensor) -> "IntegerWeight":
        """The same codes under other scales."""
        return replace(self, scale=self.stored(log_factor))


def linears(
    module: torch.nn.Module, weights: dict[str, IntegerWeight], prefix: str = ""
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Name and module of everything below ``module`` that has an integer weight."""
    for name, child in module.named_modules(prefix=prefix):
        if name in weights:
            yield name, child
