"""Where to round and by which scale, by signed gradient steps (after AutoRound, 2309.05516).

``W = (clamp(round(l + v)) - z) s exp(delta)``: ``l`` is the latent position of a weight, inside the
bin of the code that the solve chose, so that ``v = 0`` is the start bit for bit; ``v`` moves it by
half a code at most. Rounding passes gradients through as they are.
"""

from dataclasses import replace

import torch

from maca_llmc.tuning.integers import IntegerWeight

EDGE = 1e-3
"""How far inside its bin a latent position is kept, in codes."""

HALF = 0.5


class RoundedWeight:
    """An integer weight whose codes and scales are being learned.

    :param start: the weight to start from
    :param original: what it stands for, ``[rows, columns]``; None to start in the middle of bins
    """

    def __init__(self, start: IntegerWeight, original: torch.Tensor | None) -> None:
        self.start = start
        self._sign = start.scale.float().sign().unsqueeze(-1)
        codes = start.by_group(start.codes).float()
        self._latent = codes if original is None else self._inside(codes, original)
        self.offset = torch.zeros_like(codes)
        self.log_factor = torch.zeros_like(start.scale, dtype=torch.float32)

    def _inside(self, codes: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        position = self.start.by_group(original.float()) / self.start.scale.float().unsqueeze(-1)
        if self.start.zero_point is not None:
            position += self.start.zero_point.unsqueeze(-1)
        return position.clamp(codes - HALF + EDGE, codes + HALF - EDGE)

    def codes(self) -> torch.Tensor:
        """The codes now, float32 ``[rows, groups, columns of a group]``."""
        return (self._latent + self.offset).round_().clamp_(*self.start.limits)

    def weight(self) -> torch.Tensor:
        """The weight now, float32 ``[rows, columns]``."""
        levels = self.start.levels(self.codes().flatten(1))
        return (levels * self.start.stored(self.log_factor).float().unsqueeze(-1)).flatten(1)

    def step(self, gradient: torch.Tensor, rate: float, scale_rate: float) -> None:
        """Move against the sign of the gradient.

        :param gradient: of the weight, ``[rows, columns]``
        :param rate: of offsets, in codes
        :param scale_rate: of the logarithms of scale factors
        """
        gradient = gradient.float()
        of_scale = self.start.scale_gradient(gradient, self.weight())
        by_group = self.start.by_group(gradient)
        self.offset.sub_(by_group.sign() * self._sign, alpha=rate).clamp_(-HALF, HALF)
        self.log_factor.sub_(of_scale.sign(), alpha=scale_rate)

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets and log factors now, copied."""
        return self.offset.clone(), self.log_factor.clone()

    def restore(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Go back to what :meth:`state` gave."""
        self.offset, self.log_factor = state

    def result(self) -> IntegerWeight:
        """The integer weight now."""
        codes = self.codes().flatten(1).to(torch.int8)
        return replace(self.start.with_scale(self.log_factor), codes=codes)
