"""Small integer weights for tests of tuning."""

import torch

from maca_llmc.tuning.integers import IntegerWeight


def integer_weight(symmetric: bool, groups: int = 3) -> IntegerWeight:
    """5 x 12 codes of 3 bits in groups, one row under negative scales."""
    generator = torch.Generator().manual_seed(groups)
    codes = torch.randint(-4, 4, (5, 12), generator=generator, dtype=torch.int8)
    codes[0, :2] = torch.tensor([-4, 3])
    scale = (torch.rand(5, groups, generator=generator) + 0.1).bfloat16()
    scale[1] *= -1
    zero = torch.randint(-4, 4, (5, groups), generator=generator, dtype=torch.int8)
    return IntegerWeight(codes, scale, None if symmetric else zero)
