"""Codes of a few bits in 32-bit words, packed densely: code i of a row begins at bit i * bits.

This is compressed-tensors' layout from 0.18 on, in which a code may straddle two words. The serve
environment holds 0.17, which puts ten 3-bit codes into a word and leaves two bits over: its packer
is right for 2, 4 and 8 bits only, its results for 3 bits are wrong without an error.
"""

import torch

WORD = 32
# Rows unpacked at a time: positions take eight bytes each while they are computed.
_ROWS = 1024


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Signed codes of densely packed rows.

    Args:
        words: int32, rows x ceil(count * bits / 32).
        bits: of a code, 1 to 8.
        count: codes in a row; what is left of its last word is padding.

    Returns:
        int8, rows x count, each from -2^(bits - 1) on: stored codes are offset by that much.

    Raises:
        ValueError: rows that are shorter or longer than so many codes need.
    """
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != -(-count * bits // WORD):
        raise ValueError(
            f"{words.dtype} {list(words.shape)} is not rows of {count} {bits}-bit codes"
        )
    if words.shape[0] == 0:
        return torch.empty(0, count, dtype=torch.int8)
    return torch.cat([_unpack(some, bits, count) for some in words.split(_ROWS)])


def unpack_columns(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The same where columns are packed, as zero points are.

    Args:
        words: int32, ceil(count * bits / 32) x columns.
        bits: as `unpack`.
        count: codes in a column.

    Returns:
        int8, count x columns.
    """
    return unpack(words.T.contiguous(), bits, count).T.contiguous()


def _unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    begins = torch.arange(count) * bits
    first, offset = begins // WORD, begins % WORD
    # int64 without the sign, and one more word for codes that end with the last one.
    unsigned = torch.nn.functional.pad(words.to(torch.int64) & (2**WORD - 1), (0, 1))
    codes = unsigned[:, first] >> offset
    codes |= unsigned[:, first + 1] << (WORD - offset)
    codes &= 2**bits - 1
    return (codes - 2 ** (bits - 1)).to(torch.int8)
