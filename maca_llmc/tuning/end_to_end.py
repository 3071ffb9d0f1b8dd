"""Learn scales, codes frozen, from what the base answers at several input lengths.

With ``s = s0 exp(delta)`` by row and group, minimised over delta by Adam:

    sum_i L_i^-p sum_t KL(p_base(. | x_i,<t) || p_delta(. | x_i,<t))
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import tqdm

from maca_llmc.tuning.divergence import Answers, WeightedDivergence, divergence, top_answers
from maca_llmc.tuning.integers import IntegerWeight, linears
from maca_llmc.tuning.options import EndToEndOptions
from maca_llmc.tuning.scaled_linear import ScaledLinear
from maca_llmc.tuning.windows import Batch, batches_of, hold_out, steps

BETAS = (0.9, 0.95)
"""Adam's; the second shorter than usual, for runs of tens of steps."""

ByLength = dict[int, float]


class BaseAnswers:
    """What the base answers at each token of each window, computed once.

    :param model: the unquantized model
    :param windows: token ids, each ``[T]``
    """

    def __init__(self, model: Any, windows: list[torch.Tensor], options: EndToEndOptions) -> None:
        self._answers: dict[int, Answers] = {}
        lengths = [len(window) for window in windows]
        batches = batches_of(range(len(windows)), lengths, options.batch_tokens)
        for batch in tqdm.tqdm(batches, desc="the base's answers", unit="batch"):
            with torch.no_grad():
                logits = model(torch.stack([windows[i] for i in batch]).to(model.device)).logits
            for number, rows in zip(batch, logits, strict=True):
                kept = top_answers(rows, min(options.answers, rows.shape[-1] - 1))
                self._answers[number] = Answers(kept.ids.cpu(), kept.logs.half().cpu())

    def of(self, batch: Batch, device: torch.device) -> Answers:
        """Answers at the tokens of windows, one window after the other."""
        found = [self._answers[number] for number in batch]
        ids, logs = torch.cat([a.ids for a in found]), torch.cat([a.logs for a in found])
        return Answers(ids.to(device), logs.to(device))


@dataclass
class Progress:
    """Where training stands; what a resumed run needs to go on bit for bit.

    :param steps: taken
    :param history: held-out KL in nats by length, at each look, the start first
    :param factors: logarithms of scale factors now, by Linear; so ``best``, of the best look
    :param moments: Adam's first and second, by Linear
    """

    steps: int = 0
    history: list[ByLength] = field(default_factory=list)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class ScaleTuner:
    """Trains the scales of a model's integer weights.

    :param student: the quantized model, dequantized; its Linears become :class:`ScaledLinear`
    :param weights: its integer weights by name
    :param windows: token ids, each ``[T]``; some are held out, see ``windows.hold_out``
    :param dtype: to compute in
    """

    def __init__(
        self,
        student: Any,
        weights: dict[str, IntegerWeight],
        windows: list[torch.Tensor],
        answers: BaseAnswers,
        options: EndToEndOptions,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._windows, self._answers = student, windows, answers
        self._lengths = [len(window) for window in windows]
        self._options = options
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        student.to(dtype)
        student.config.use_cache = False
        self.linears: dict[str, ScaledLinear] = {}
        for name, module in list(linears(student, weights)):
            bias: Any = module.bias
            self.linears[name] = ScaledLinear(weights[name].to(student.device), bias)
            student.set_submodule(name, self.linears[name])

    def train(
        self, seed: int, progress: Progress, keep: Callable[[Progress], None]
    ) -> dict[str, torch.Tensor]:
        """Take the steps.

        :param progress: where to go on
        :param keep: is called after each look at held-out windows
        :return: by Linear, the logarithms of scale factors that were best on held-out windows
        """
        train, held = hold_out(self._lengths)
        tokens = sum(self._lengths[i] for i in train) * self._options.epochs
        total = max(1, tokens // self._options.step_tokens)
        parameters = [linear.log_factor for linear in self.linears.values()]
        optimizer = torch.optim.Adam(parameters, lr=self._options.rate, betas=BETAS)
        if progress.steps:
            self._take_up(progress, optimizer)
        else:
            progress.history.append(self.held_out(held))
            progress.best = self._factors()
        draw = steps(train, self._lengths, self._options.step_tokens, random.Random(seed))
        for _ in range(progress.steps):
            next(draw)
        every = max(1, total // self._options.checks)
        with tqdm.tqdm(total=total, initial=progress.steps, desc="tuning scales") as bar:
            bar.set_postfix_str(f"KL {_mean(progress.history[-1]):.4f}")
            while progress.steps < total:
                rate = self._options.rate * _schedule(progress.steps, total)
                optimizer.param_groups[0]["lr"] = rate
                self._backward(next(draw))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress.steps += 1
                bar.update()
                if progress.steps % every == 0 or progress.steps == total:
                    self._look(progress, held, optimizer)
                    bar.set_postfix_str(f"KL {_mean(progress.history[-1]):.4f}")
                    keep(progress)
        return progress.best

    @torch.no_grad()
    def held_out(self, held: list[int]) -> ByLength:
        """KL in nats a token, by length."""
        found: dict[int, list[float]] = defaultdict(list)
        for batch in batches_of(held, self._lengths, self._options.batch_tokens):
            logits = self._logits(batch)
            kl = divergence(logits, self._answers.of(batch, logits.device)).view(len(batch), -1)
            found[kl.shape[1]] += kl.mean(1).tolist()
        return {length: sum(kl) / len(kl) for length, kl in sorted(found.items())}

    def _logits(self, batch: Batch) -> torch.Tensor:
        ids = torch.stack([self._windows[i] for i in batch]).to(self._model.device)
        logits: torch.Tensor = self._model(ids).logits
        return logits.flatten(0, 1)

    def _backward(self, batches: list[Batch]) -> None:
        weight = {len_: len_**-self._options.length_exponent for len_ in set(self._lengths)}
        drawn = [self._lengths[i] for batch in batches for i in batch]
        mass = sum(weight[length] * length for length in drawn)
        for batch in batches:
            logits = self._logits(batch)
            share = weight[self._lengths[batch[0]]] / mass
            weights = torch.full((len(logits),), share, device=logits.device)
            answers = self._answers.of(batch, logits.device)
            WeightedDivergence.apply(logits, answers, weights).backward()

    def _look(self, progress: Progress, held: list[int], optimizer: torch.optim.Adam) -> None:
        progress.history.append(self.held_out(held))
        progress.factors = self._factors()
        if _mean(progress.history[-1]) <= min(map(_mean, progress.history)):
            progress.best = progress.factors
        progress.moments = {
            name: (state["exp_avg"].clone(), state["exp_avg_sq"].clone())
            for name, linear in self.linears.items()
            for state in [optimizer.state[linear.log_factor]]
        }

    def _take_up(self, progress: Progress, optimizer: torch.optim.Adam) -> None:
        for name, linear in self.linears.items():
            linear.log_factor.data.copy_(progress.factors[name])
            first, second = progress.moments[name]
            optimizer.state[linear.log_factor] = {
                "step": torch.tensor(float(progress.steps)),
                "exp_avg": first.to(linear.log_factor.device),
                "exp_avg_sq": second.to(linear.log_factor.device),
            }

    def _factors(self) -> dict[str, torch.Tensor]:
        return {n: linear.log_factor.detach().cpu().clone() for n, linear in self.linears.items()}


def _schedule(step: int, total: int) -> float:
    """Rise over a twentieth of the steps, then fall in a line to nothing."""
    warm = max(1, total // 20)
    return (step + 1) / warm if step < warm else (total - step) / (total - warm)


def _mean(by_length: ByLength) -> float:
    return sum(by_length.values()) / len(by_length)
