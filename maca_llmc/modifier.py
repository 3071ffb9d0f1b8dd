"""MaCaModifier: llm-compressor's GPTQ with a Hessian that knows the length of its sequences."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from compressed_tensors.utils import getattr_chain
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator

from maca_llmc.common.errors import CalibrationError
from maca_llmc.gptq import cpu_backend  # noqa: F401  # registers the compiled sweep
from maca_llmc.gptq.gptaq import feedback
from maca_llmc.gptq.hessian import fill_dead_columns, mirror
from maca_llmc.gptq.moments import Moments
from maca_llmc.gptq.nesting import refuse_length_dependence
from maca_llmc.gptq.ranks import (
    agree_on_groups,
    agree_on_scale,
    broadcast_followers,
    failing_together,
    world_size,
)
from maca_llmc.gptq.scales import search_scales
from maca_llmc.gptq.sequences import BatchLayout, module_tokens, split_sequences, valid_tokens
from maca_llmc.gptq.shared_inputs import Group, Input, SharedInputs, changed_in_place
from maca_llmc.gptq.solve import Factor, NotPositiveDefiniteError, factorize
from maca_llmc.gptq.stacks import ScaleSearch, cut_batches, quantize_stacks, row_stacks
from maca_llmc.gptq.token_weights import Segment, sequence_segments, total_weight
from maca_llmc.llmcompressor_api import (
    GPTQModifier,
    ModifierFactory,
    QuantizationMixin,
    active_session,
    assign_batches,
    empty_hessian,
    forget_causal_masks,
    gptq_progress,
    keep_causal_masks,
    restore_gptq_progress,
)
from maca_llmc.recipe.schemes import check_order, check_schemes
from maca_llmc.recipe.targets import UNFUSED, check_overlap, unlike_siblings
from maca_llmc.run.diagonals import DiagonalRecorder
from maca_llmc.run.written import check_set, mark_unset

__all__ = ["MaCaModifier"]

FullInput = Callable[[torch.nn.Module], torch.Tensor | None]


class MaCaModifier(GPTQModifier):
    """GPTQ calibrated by length: each sequence weighs ``L^-p`` per token, and maybe its prefixes.

    Everything ``GPTQModifier`` takes works as it does there. Six fields are added:

    :param length_exponent: p of the token weight ``L^-p``, from 0 to 1. 1 (the default) is MaCa as
        we read it: each sequence is one sample, whatever its length. 0 is GPTQ: each token is one.
    :param nested_scales: lengths, increasing, or None. With it each sequence counts as itself and
        as each of its own prefixes of these lengths, in the same forward pass. It needs a causal
        model whose positions do not depend on the length, and refuses any other.
    :param first_token_weight: how many times the weight of its sequence's tokens the first one
        gets, above 0. It is an attention sink in most models: what goes wrong with it goes wrong
        everywhere. 4 (the default) is what helped or did no harm wherever it was tried, 16 was
        better on Gemma 3 (see ``benchmarks/ACCURACY.md``); 1 leaves it alone.
    :param hessian_scales: choose the scale of each group by what rounding costs under the Hessian
        (see ``scales.py``) instead of by the range of its weights: of integers by group or channel,
        where the recipe names no observer of its own. False leaves scales to observers. What it
        does depends on the model (``benchmarks/ACCURACY.md``).
    :param signed_scales: let ``hessian_scales`` choose negative scales, where codes are symmetric
        and of 4 bits at most (see ``scales.py``). False keeps every scale positive, for kernels
        that do not take others.
    :param gptaq_alpha: above 0 it is GPTAQ (arXiv 2504.02692): weights also make up for what their
        inputs have become behind the quantized layers before them, wholly at 1. It takes the
        pipeline "maca", one rank, integers by group or channel, and about three times the forward
        passes.

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

    Modules that receive the same tensor (q, k and v; gate and up, those of all experts when all
    are calibrated) share one Hessian, one factorisation and one sweep over their stacked rows.

    Where all tokens weigh the same, the Hessian is GPTQ's and so is its dampening. Otherwise dead
    columns get the mean diagonal of the live ones (see ``hessian.fill_dead_columns``).

    Calibration fails with a ``CalibrationError`` (a ``ValueError``) naming the module on NaN or
    infinity in its inputs, and on a targeted module that the model never calls (add it to
    ``ignore``). A module that is called but sees no token (an expert no token was routed to) is
    rounded to nearest and named in a warning. A Hessian that is not positive definite gets ten
    times the dampening until it is; such modules are named and counted at the end.
    """

    dampening_frac: float | None = Field(default=0.01, ge=0.0)
    block_size: int = Field(default=128, ge=1)
    length_exponent: float = Field(default=1.0, ge=0.0, le=1.0)
    nested_scales: list[int] | None = None
    first_token_weight: float = Field(default=4.0, gt=0.0)
    hessian_scales: bool = True
    signed_scales: bool = True
    gptaq_alpha: float = Field(default=0.0, ge=0.0, le=1.0)

    _layout: BatchLayout | None = PrivateAttr(default=None)
    _reference: int | None = PrivateAttr(default=None)
    _weighted: bool = PrivateAttr(default=False)
    _inputs: SharedInputs[Moments] = PrivateAttr()
    _groups: dict[torch.nn.Module, Group[Moments]] = PrivateAttr(default_factory=dict)
    _ranks: dict[torch.nn.Module, int] = PrivateAttr(default_factory=dict)
    _done: set[torch.nn.Module] = PrivateAttr(default_factory=set)
    _unseen: list[str] = PrivateAttr(default_factory=list)
    _raised: dict[str, float] = PrivateAttr(default_factory=dict)
    _recorder: DiagonalRecorder | None = PrivateAttr(default=None)
    _full_input: FullInput | None = PrivateAttr(default=None)
    _failure: CalibrationError | None = PrivateAttr(default=None)

    @field_validator("nested_scales")
    @classmethod
    def _validate_nested_scales(cls, scales: list[int] | None) -> list[int] | None:
        if scales is None:
            return None
        if not scales or min(scales) < 1 or sorted(set(scales)) != scales:
            raise ValueError(f"nested_scales must be positive and increasing, got {scales}")
        return scales

    def model_post_init(self, context: Any, /) -> None:
        """Start with no inputs seen."""
        super().model_post_init(context)
        self._inputs = SharedInputs(self._no_moments, self._add_input, Moments.copy)

    @property
    def raised_dampening(self) -> dict[str, float]:
        """By name, modules that needed more dampening than asked for, and how much."""
        return dict(self._raised)

    def record_diagonals(self, recorder: DiagonalRecorder) -> None:
        """Have ``recorder`` see the calibration sequences of the modules it asks for."""
        self._recorder = recorder

    def progress(self) -> dict[str, Any]:
        """What the modifier knows of the layers it has finished; JSON-able."""
        return {
            **gptq_progress(self),
            "done": [self._module_names[module] for module in self._done],
            "unseen": self._unseen,
            "raised": self._raised,
        }

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Take over what :meth:`progress` said in a run that was killed."""
        restore_gptq_progress(self, progress)
        module_of = {name: module for module, name in self._module_names.items()}
        self._done = {module_of[name] for name in progress["done"]}
        self._unseen = list(progress["unseen"])
        self._raised = dict(progress["raised"])

    def set_full_input(self, input_of: FullInput | None) -> None:
        """Take what modules receive in the unquantized model from ``input_of``; for GPTAQ.

        :param input_of: None for a module whose turn it is not
        """
        self._full_input = input_of

    # what a subclass may do otherwise, see docs/extending.md

    def token_segments(self, length: int, reference: int) -> list[Segment]:
        """How much each token of a sequence weighs in the Hessian.

        :param length: valid tokens of the sequence
        :param reference: the length of the first sequence, to divide lengths by
        :return: in order, covering ``[0, length)``
        """
        return sequence_segments(
            length, self.length_exponent, self.nested_scales, reference, self.first_token_weight
        )

    def scale_search(self) -> ScaleSearch | None:
        """What chooses scales under the Hessian; None leaves them to observers."""
        if not self.hessian_scales:
            return None
        return partial(search_scales, signed=self.signed_scales)

    # lifecycle

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Attach schemes; refuse what the command line would refuse of a recipe.

        Linears that vLLM would fuse and that differ are named in a warning: others may read them.
        """
        if self.nested_scales:
            refuse_length_dependence(state.model.config)
        if self.has_config():  # otherwise another modifier's schemes
            self._check_recipe(state.model)
        keep_causal_masks(state.model.config)
        initialized = bool(super().on_initialize(state, **kwargs))
        mark_unset(state.model)
        return initialized

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
        if self._raised:
            logger.warning(
                f"{len(self._raised)} of {len(self._done)} modules had a Hessian that was not "
                f"positive definite with dampening {self._dampening:g} and got more: "
                + ", ".join(f"{name} ({value:g})" for name, value in self._raised.items())
            )
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
        check_set(state.model)
        return finalized

    # calibration

    def calibrate_module(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        """Add one batch of a module's inputs to its Hessian, each token with its weight.

        :param args: the module's inputs, the first one its tokens ``[b, T, d]`` or ``[n, d]``
        """
        try:
            self._receive(module, args[0])
        except CalibrationError as error:
            if world_size() == 1:
                raise
            self._failure = self._failure or error  # for when the ranks meet
        name = self._module_names[module]
        if self._recorder is not None and name in self._recorder.modules:
            tokens = module_tokens(module, args[0])
            for sequence in split_sequences(tokens, self._layout) or ():
                self._recorder.add(name, sequence)

    def compress_modules(self) -> None:
        """Quantize what was calibrated, on every rank the groups it was assigned."""
        with failing_together():
            if self._failure is not None:
                raise self._failure
            groups = self._inputs.take()
            for group in groups:
                group.statistic.hessian.settle()
        ranks = world_size()
        if ranks > 1 and self.gptaq_alpha:
            raise CalibrationError(f"gptaq_alpha: works on one rank, not on {ranks}: set it to 0")
        if ranks > 1:
            groups = agree_on_groups(groups, self._module_names)
        # stock's own bookkeeping, with one entry a group: its first member
        self._groups = {group.members[0]: group for group in groups}
        self._hessians = {
            first: group.statistic.hessian.hessian for first, group in self._groups.items()
        }
        self._num_samples = {first: group.statistic.count for first, group in self._groups.items()}
        super().compress_modules()
        if ranks > 1:
            broadcast_followers(groups, self._ranks)
        self._done.update(member for group in groups for member in group.members)
        self._groups = {}

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        """Quantize groups, each given by its first member, and everything in them.

        Groups of one are solved side by side where llm-compressor would do so
        (``batched_quantization``).
        """
        with failing_together():
            self._quantize(module_list)

    def _reduce_hessian_to_target_rank(self, module_list: Any, module_to_rank: Any) -> None:
        self._ranks = module_to_rank
        if module_list:  # a subgraph without modules to quantize, such as the head, comes too
            hessians = [self._hessians[module] for module in module_list]
            self._reference, self._weighted = agree_on_scale(
                hessians, self._reference, self._weighted, self.length_exponent
            )
        super()._reduce_hessian_to_target_rank(module_list, module_to_rank)

    # the parts

    def _receive(self, module: torch.nn.Module, tensor: torch.Tensor) -> None:
        full = None
        if self.gptaq_alpha:
            full = self._input_in_full_precision(module)
            if full is None:
                return  # its turn comes in another stage
        self._inputs.receive(module, Input(tensor, (self._layout, full)))

    @property
    def _dampening(self) -> float:
        return self.dampening_frac or 0.0

    def _check_recipe(self, model: Any) -> None:
        check_schemes(self, model, text_only=False)
        recipe = active_session().lifecycle.recipe
        modifiers = [m for m in recipe.modifiers if isinstance(m, QuantizationMixin)]
        check_order(recipe.modifiers)
        check_overlap(modifiers, model)
        if unlike := unlike_siblings(modifiers, model):
            logger.warning(f"{unlike} have different schemes: {UNFUSED}")

    def _input_in_full_precision(self, module: torch.nn.Module) -> torch.Tensor | None:
        if self._full_input is None:
            raise CalibrationError(
                "gptaq_alpha: needs the unquantized model's inputs, which only our pipeline has: "
                'use maca-llmc quantize or oneshot(pipeline="maca"), or set gptaq_alpha: 0'
            )
        return self._full_input(module)

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
        return self.token_segments(length, self._reference)

    def _no_moments(self, module: torch.nn.Module) -> Moments:
        return Moments.onto(empty_hessian(module), asymmetric=self.gptaq_alpha > 0)

    def _add_input(self, modules: list[torch.nn.Module], moments: Moments, given: Input) -> None:
        if given.is_changed:
            raise changed_in_place(self._module_names[modules[0]])
        layout, full = given.context
        tokens = module_tokens(modules[0], given.tensor)
        if full is not None:  # side by side, so that they are split alike
            other = module_tokens(modules[0], full).to(tokens.device)
            tokens = torch.cat([tokens, other], dim=-1)
        if tokens.shape[0] and _unpadded(tokens, layout):  # rows all alike: no need to take apart
            sequences = [tokens]
        else:
            split = split_sequences(tokens, layout)
            if split is None:
                self._add_routed(modules, moments, tokens, layout)
                return
            sequences = [sequence.unsqueeze(0) for sequence in split]
        for rows in sequences:
            for segment in self._segments(rows.shape[1]):
                part = rows[:, segment.start : segment.stop]
                self._add(moments, part.reshape(-1, part.shape[-1]), segment.weight)
            moments.count += rows.shape[0]

    def _add(self, moments: Moments, rows: torch.Tensor, weight: float) -> None:
        self._weighted |= weight != 1.0
        moments.add(rows, weight)

    def _add_routed(
        self,
        modules: list[torch.nn.Module],
        moments: Moments,
        tokens: torch.Tensor,
        layout: BatchLayout,
    ) -> None:
        if layout.valid is not None:
            raise CalibrationError(
                f"{self._module_names[modules[0]]}: routed tokens of a padded batch could be "
                "padding; calibrate with batches of one, or with moe_calibrate_all_experts=True"
            )
        totals = [total_weight(self._segments(length)) for length in layout.lengths]
        mean = sum(total for total, _ in totals) / sum(count for _, count in totals)
        self._add(moments, tokens, mean)
        moments.count += 1

    def _completed_hessian(self, first: torch.nn.Module) -> torch.Tensor:
        hessian, count = self._hessians.pop(first), self._num_samples.pop(first)
        name = self._module_names[first]
        mirror(hessian)
        if not torch.isfinite(hessian).all():
            raise CalibrationError(
                f"{name}: its inputs hold NaN or infinity; check the model's weights and dtype"
            )
        unseen = not hessian.diagonal().any()
        if unseen:
            self._unseen += [self._module_names[m] for m in self._groups[first].members]
        if unseen or self._weighted:
            fill_dead_columns(hessian)
        return hessian.div_(count.clamp(min=1))  # as stock: a factor that cancels

    def _factor(self, first: torch.nn.Module, hessian: torch.Tensor, ordered: bool) -> Factor:
        names = [self._module_names[member] for member in self._groups[first].members]
        try:
            factor = factorize(hessian, self._dampening, ordered)
        except NotPositiveDefiniteError as error:
            raise CalibrationError(
                f"{', '.join(names)}: the Hessian is {error}; calibrate with more tokens"
            ) from error
        if factor.dampening != self._dampening:
            self._raised.update(dict.fromkeys(names, factor.dampening))
        return factor

    def _quantize(self, module_list: list[torch.nn.Module]) -> None:
        hessians = {first: self._completed_hessian(first) for first in module_list}
        alone = [first for first in module_list if len(self._groups[first].members) == 1]
        batches = assign_batches(alone, self.batched_quantization, self.block_size)
        for batch in cut_batches(batches):
            factors = [self._factor(first, hessians[first], _ordered(first)) for first in batch]
            used = [hessians.pop(first) for first in batch]
            self._solve([[first] for first in batch], factors, used, self._feeds(batch, factors))
        for first in list(hessians):
            self._solve_shared(first, hessians.pop(first))

    def _solve_shared(self, first: torch.nn.Module, hessian: torch.Tensor) -> None:
        factors: dict[bool, Factor] = {}
        for stack in row_stacks(self._groups[first].members):
            ordered = _ordered(stack[0])
            if ordered not in factors:
                factors[ordered] = self._factor(first, hessian, ordered)
            factor = factors[ordered]
            self._solve([stack], [factor], [hessian], self._feeds([first], [factor]))

    def _feeds(self, firsts: list[torch.nn.Module], factors: list[Factor]) -> torch.Tensor | None:
        """GPTAQ's feedback of groups, each given by its first member; None for GPTQ."""
        if not self.gptaq_alpha:
            return None
        feeds = []
        for first, factor in zip(firsts, factors, strict=True):
            moments = self._groups[first].statistic
            assert moments.cross is not None  # every input came with its full-precision one
            cross = moments.cross / moments.count.clamp(min=1)  # as the Hessian is divided
            feeds.append(feedback(cross, factor, self.gptaq_alpha))
        return torch.stack(feeds)

    def _solve(
        self,
        stacks: list[list[torch.nn.Module]],
        factors: list[Factor],
        hessians: list[torch.Tensor],
        feeds: torch.Tensor | None,
    ) -> None:
        names = [self._module_names[module] for stack in stacks for module in stack]
        logger.info(f"Quantizing {len(names)} module(s): {names}")
        quantize_stacks(stacks, factors, hessians, self.block_size, self.scale_search(), feeds)
        self._num_compressed_modules += len(names)


def _unpadded(tokens: torch.Tensor, layout: BatchLayout | None) -> bool:
    """Whether ``tokens`` are ``[b, T, d]`` of a batch without padding."""
    if tokens.ndim != 3:
        return False
    return layout is None or layout.valid is None or tuple(tokens.shape[:2]) != layout.shape


def _ordered(module: torch.nn.Module) -> bool:
    return bool(module.quantization_scheme.weights.actorder)  # type: ignore[union-attr]


def _forward_signature(module: torch.nn.Module) -> inspect.Signature:
    return inspect.signature(type(module).forward)


def _is_hidden_states(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


ModifierFactory.register("MaCaModifier", MaCaModifier)
