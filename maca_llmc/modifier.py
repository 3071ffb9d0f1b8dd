"""MaCaModifier: llm-compressor's GPTQ with a Hessian that knows the length of its sequences."""

import inspect
from typing import Any

import torch
from compressed_tensors.utils import getattr_chain
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator
from torch import distributed as dist

from maca_llmc.causality import refuse_length_dependence
from maca_llmc.errors import CalibrationError
from maca_llmc.hessian import add_rows, fill_dead_columns
from maca_llmc.inspection import DiagonalRecorder
from maca_llmc.llmcompressor_api import (
    GPTQModifier,
    ModifierFactory,
    empty_hessian,
    forget_causal_masks,
    keep_causal_masks,
)
from maca_llmc.sequences import BatchLayout, module_tokens, split_sequences, valid_tokens
from maca_llmc.weights import Segment, sequence_segments, total_weight

__all__ = ["MaCaModifier"]


class MaCaModifier(GPTQModifier):
    """GPTQ calibrated by length: each sequence weighs ``L^-p`` per token, and maybe its prefixes.

    Everything ``GPTQModifier`` takes works as it does there. Two fields are added:

    :param length_exponent: p of the token weight ``L^-p``, from 0 to 1. 1 (the default) is MaCa as
        we read it: each sequence is one sample, whatever its length. 0 is GPTQ: each token is one.
    :param nested_scales: lengths, increasing, or None. With it each sequence counts as itself and
        as each of its own prefixes of these lengths, in the same forward pass. It needs a causal
        model whose positions do not depend on the length, and refuses any other.

    Sample recipe:

    ```yaml
    quantize_stage:
      quantize_modifiers:
        MaCaModifier:
          scheme: W4A16
          ignore: [lm_head]
          length_exponent: 1.0
    ```

    What counts as a sequence, and what weight its tokens get:

    - a row of the batch is a sequence, of as many tokens as its attention mask leaves real;
      padding never enters the Hessian, on whichever side it is;
    - flattened inputs with one row per token of the batch (experts, when all are calibrated) are
      split into their sequences again, taken to be in the batch's order;
    - tokens that a router picked (experts, with ``moe_calibrate_all_experts=False``) cannot be
      mapped back: each gets the mean weight of the batch's tokens, which for a batch of one
      sequence without nesting is exactly its own. In a padded batch they could be padding, so
      that is refused with a ``CalibrationError``: use batches of one;
    - inputs of other proportions (vision patches, cross attention) are taken row by row.

    Where all tokens weigh the same, the Hessian is GPTQ's and so is its dampening. Otherwise dead
    columns get the mean diagonal of the live ones (see ``hessian.fill_dead_columns``).

    Calibration fails with a ``CalibrationError`` (a ``ValueError``) naming the module on NaN or
    infinity in its inputs, and on a targeted module that the model never calls (add it to
    ``ignore``). A module that is called but sees no token (an expert no token was routed to) is
    rounded to nearest and named in a warning.
    """

    length_exponent: float = Field(default=1.0, ge=0.0, le=1.0)
    nested_scales: list[int] | None = None

    _layout: BatchLayout | None = PrivateAttr(default=None)
    _reference: int | None = PrivateAttr(default=None)
    _weighted: bool = PrivateAttr(default=False)
    _done: set[torch.nn.Module] = PrivateAttr(default_factory=set)
    _unseen: list[str] = PrivateAttr(default_factory=list)
    _recorder: DiagonalRecorder | None = PrivateAttr(default=None)

    @field_validator("nested_scales")
    @classmethod
    def _validate_nested_scales(cls, scales: list[int] | None) -> list[int] | None:
        if scales is None:
            return None
        if not scales or min(scales) < 1 or sorted(set(scales)) != scales:
            raise ValueError(f"nested_scales must be positive and increasing, got {scales}")
        return scales

    def record_diagonals(self, recorder: DiagonalRecorder) -> None:
        """Have ``recorder`` see the calibration sequences of the modules it asks for."""
        self._recorder = recorder

    # lifecycle

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Attach schemes; refuse nesting where prefixes would not be what they stand for."""
        if self.nested_scales:
            refuse_length_dependence(state.model.config)
        keep_causal_masks(state.model.config)
        return super().on_initialize(state, **kwargs)

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Register GPTQ's hooks, and ours that read the attention mask of each batch."""
        super().on_calibration_start(state, event, **kwargs)
        for module in state.model.modules():
            if "attention_mask" in _forward_signature(module).parameters:
                hook: Any = self._read_layout  # with_kwargs gives it one argument more
                self.register_hook(module, hook, "forward_pre", with_kwargs=True)

    def on_sequential_epoch_end(
        self, state: Any, event: Any, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Quantize the modules calibrated since the last call."""
        self._layout = None
        super().on_sequential_epoch_end(state, event, modules=modules, **kwargs)

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        """Refuse to end with a targeted module left as it was."""
        finalized = super().on_finalize(state, **kwargs)
        forget_causal_masks(state.model.config)
        if self._unseen:
            logger.warning(
                f"{len(self._unseen)} modules saw no calibration token that was not zero and were "
                f"rounded to nearest: {', '.join(self._unseen)}"
            )
        missed = [
            name
            for module, name in self._module_names.items()
            if isinstance(module, torch.nn.Linear)
            and getattr_chain(module, "quantization_scheme.weights", None) is not None
            and module not in self._done
        ]
        if missed:
            raise CalibrationError(
                f"{len(missed)} targeted modules were never called in calibration, first "
                f"{missed[0]!r}: add them to the recipe's ignore list"
            )
        return finalized

    # calibration

    def calibrate_module(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        """Add one batch of a module's inputs to its Hessian, each token with its weight.

        :param args: the module's inputs, the first one its tokens ``[b, T, d]`` or ``[n, d]``
        """
        tokens = module_tokens(module, args[0])
        if module not in self._hessians:
            self._hessians[module] = empty_hessian(module)
            self._num_samples[module] = torch.zeros((), device=self._hessians[module].device)

        sequences = split_sequences(tokens, self._layout)
        if sequences is None:
            self._add_routed(module, tokens)
            return
        for sequence in sequences:
            for segment in self._segments(sequence.shape[0]):
                self._add(module, sequence[segment.start : segment.stop], segment.weight)
            if self._recorder is not None:
                self._recorder.add(self._module_names[module], sequence)
        self._num_samples[module] += len(sequences)

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        """Check and complete each Hessian, then quantize as GPTQ does."""
        for module in module_list:
            self._complete(module)
        super().compress_module_list(module_list)

    def compress_modules(self) -> None:
        """Quantize what was calibrated, on every rank what it was assigned."""
        calibrated = list(self._hessians)
        super().compress_modules()
        if dist.is_available() and dist.is_initialized():
            # on the CPU ranks share the weights in memory, and llm-compressor does not wait there
            # until all are written
            dist.barrier()
        self._done.update(calibrated)

    def _reduce_hessian_to_target_rank(self, module_list: Any, module_to_rank: Any) -> None:
        if module_list:  # a subgraph without modules to quantize, such as the head, comes too
            self._agree_on_reference(module_list)
        super()._reduce_hessian_to_target_rank(module_list, module_to_rank)

    # the parts

    def _read_layout(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = _forward_signature(module).bind_partial(module, *args, **kwargs).arguments
        hidden = next((value for value in given.values() if _is_hidden_states(value)), None)
        try:
            valid = valid_tokens(given.get("attention_mask"))
        except TypeError as error:
            raise TypeError(f"{type(module).__name__}: {error}") from None
        if hidden is not None:
            self._layout = BatchLayout((hidden.shape[0], hidden.shape[1]), valid)
        elif valid is not None:
            self._layout = BatchLayout((valid.shape[0], valid.shape[1]), valid)

    def _segments(self, length: int) -> list[Segment]:
        if self._reference is None:
            self._reference = length
        return sequence_segments(length, self.length_exponent, self.nested_scales, self._reference)

    def _add(self, module: torch.nn.Module, rows: torch.Tensor, weight: float) -> None:
        self._weighted |= weight != 1.0
        add_rows(self._hessians[module], rows, weight)

    def _add_routed(self, module: torch.nn.Module, tokens: torch.Tensor) -> None:
        layout = self._layout
        assert layout is not None  # split_sequences maps every input outside of a batch
        if layout.valid is not None:
            raise CalibrationError(
                f"{self._module_names[module]}: routed tokens of a padded batch could be padding; "
                "calibrate with batches of one, or with moe_calibrate_all_experts=True"
            )
        totals = [total_weight(self._segments(length)) for length in layout.lengths]
        mean = sum(total for total, _ in totals) / sum(count for _, count in totals)
        self._add(module, tokens, mean)
        self._num_samples[module] += 1

    def _complete(self, module: torch.nn.Module) -> None:
        name, hessian = self._module_names[module], self._hessians[module]
        if not torch.isfinite(hessian).all():
            raise CalibrationError(
                f"{name}: its inputs hold NaN or infinity; check the model's weights and dtype"
            )
        unseen = not hessian.diagonal().any()
        if unseen:
            self._unseen.append(name)
        if unseen or self._weighted:
            fill_dead_columns(hessian)
        self._num_samples[module].clamp_(min=1)

    def _agree_on_reference(self, modules: list[torch.nn.Module]) -> None:
        """Put the Hessians of all ranks on one scale before they are added up."""
        own = self._reference or 0
        agreed = torch.tensor([own, self._weighted], device=self._num_samples[modules[0]].device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        shared = int(agreed[0])
        factor = (own / shared) ** -self.length_exponent if own else 1.0
        # a rank whose own lengths are all alike does not know that another rank's differ
        rescaled = torch.tensor([factor != 1.0 or bool(agreed[1])], device=agreed.device).int()
        dist.all_reduce(rescaled, op=dist.ReduceOp.MAX)
        self._reference, self._weighted = shared, bool(rescaled)
        if factor != 1.0:
            for module in modules:
                self._hessians[module] *= factor


def _forward_signature(module: torch.nn.Module) -> inspect.Signature:
    return inspect.signature(type(module).forward)


def _is_hidden_states(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


ModifierFactory.register("MaCaModifier", MaCaModifier)
