"""From the rows a module received back to the calibration sequences they belong to."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchLayout:
    """Which tokens of the batch now in the model are real.

    :param shape: ``(rows of the batch, tokens per row)``, padding included
    :param valid: bool ``[rows, tokens]``, False at padding; None when nothing is padded
    """

    shape: tuple[int, int]
    valid: torch.Tensor | None

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        if self.valid is None:
            return [self.shape[1]] * self.shape[0]
        return [int(count) for count in self.valid.sum(dim=1)]


def valid_tokens(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Read which tokens are real out of whatever attention mask a layer was given.

    A token is real when it may attend to itself: true in causal, sliding-window and bidirectional
    masks, false on padding, whichever side it is on.

    :param attention_mask: None (nothing padded); ``[b, T]`` with non-zero for real tokens; or
        ``[b, 1 or heads, T, T]``, bool (True may attend) or additive (0 may attend)
    :return: bool ``[b, T]``, or None when nothing is padded
    :raises TypeError: for any other mask
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 4):
        raise TypeError(
            f"cannot read padding from an attention mask of type {type(attention_mask).__name__}: "
            "calibrate with eager, sdpa or flash attention"
        )
    if attention_mask.ndim == 2:
        valid = attention_mask != 0
    else:
        own = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        valid = own if own.dtype == torch.bool else own == 0
    return None if bool(valid.all()) else valid


def module_tokens(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The rows that a module multiplies its weight with, as ``[..., d]``.

    :param inputs: a Linear's input as it is; a Conv2d's ``[b, channels, h, w]`` unfolded to one
        row per output position, ``[b, positions, d]``
    """
    if isinstance(module, torch.nn.Conv2d):
        unfold = torch.nn.Unfold(
            module.kernel_size,
            module.dilation,
            padding=module.padding,  # type: ignore[arg-type]  # as stock: numbers only
            stride=module.stride,
        )
        return unfold(inputs).transpose(1, 2)
    if inputs.ndim > 3:
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    return inputs


def split_sequences(tokens: torch.Tensor, layout: BatchLayout | None) -> list[torch.Tensor] | None:
    """Split a module's input into its sequences, padding removed.

    Handles ``[b, T, d]`` and its flattened form ``[b * T, d]`` (an expert that sees every token).
    An input of other proportions that still has a batch dimension (vision patches, cross
    attention) is taken row by row, whole.

    :param tokens: ``[b, T, d]`` or ``[tokens, d]``
    :param layout: of the batch now in the model; None outside of one, where a 2-D input is one
        sequence
    :return: one ``[length, d]`` per row of the batch, empty rows left out; None when the rows
        cannot be mapped back to sequences (tokens that a router picked)
    """
    if tokens.ndim == 2:
        if layout is None:
            tokens = tokens.unsqueeze(0)
        elif tokens.shape[0] == layout.shape[0] * layout.shape[1]:
            tokens = tokens.reshape(*layout.shape, tokens.shape[-1])
        else:
            return None
    if layout is None or layout.valid is None or tuple(tokens.shape[:2]) != layout.shape:
        rows = list(tokens)
    else:
        valid = layout.valid.to(tokens.device)
        rows = [row[keep] for row, keep in zip(tokens, valid, strict=True)]
    return [row for row in rows if row.shape[0]]
