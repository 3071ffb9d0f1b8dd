"""How far a quantized model is from its base, by input length, in transformers.

On dequantized weights, so for any bit width: KL divergence to the base model, and perplexity, of
the same target tokens under inputs of several lengths. What quantized activations do (W8A8) is not
in it: for that, measure in vLLM with ``maca-serve accuracy``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm
from transformers import CompressedTensorsConfig

from maca_llmc import defaults, models, record
from maca_llmc.data import EVALUATION_SAMPLE, read_documents
from maca_llmc.data.calibration import special_prefix, tokenize
from maca_llmc.device import resolve_device
from maca_llmc.errors import UserError
from maca_llmc.progress import quiet

TARGETS = 32
"""Tokens at the end of each input that are scored."""


@dataclass(frozen=True)
class Window:
    """One document span whose last ``TARGETS`` tokens are scored under inputs of any length.

    :param tokens: the longest input, without the special tokens in front
    """

    tokens: tuple[int, ...]

    def input_of(self, length: int, prefix: Sequence[int]) -> list[int]:
        """The ``length`` tokens that end with the target block, special tokens in front."""
        return [*prefix, *self.tokens[len(self.tokens) - (length - len(prefix)) :]]


def cut_spans(documents: Sequence[Sequence[int]], span: int, count: int) -> list[Window]:
    """The first ``count`` non-overlapping spans, the first of each document, then the second.

    :param documents: token ids of each
    :param span: tokens of a window
    :raises UserError: when there are fewer
    """
    per_document = [
        [
            Window(tuple(document[start : start + span]))
            for start in range(0, len(document) - span + 1, span)
        ]
        for document in documents
    ]
    rounds = max((len(windows) for windows in per_document), default=0)
    ordered = [
        windows[turn] for turn in range(rounds) for windows in per_document if turn < len(windows)
    ]
    if len(ordered) < count:
        raise UserError(
            f"the evaluation text has {len(ordered)} windows of {span} tokens and {count} are "
            "asked for: give more text, fewer --windows or shorter --lengths"
        )
    return ordered[:count]


def evaluate(
    base: str,
    checkpoints: Sequence[str | Path],
    *,
    text: Any = None,
    lengths: Sequence[int] = defaults.EVALUATION_LENGTHS,
    windows: int = defaults.EVALUATION_WINDOWS,
    device: str = "auto",
) -> dict[str, Any]:
    """Compare checkpoints with their base model on the same target tokens.

    :param base: the unquantized model: a folder, a hub name or the embedded model's name
    :param checkpoints: folders of quantized models
    :param text: evaluation text, as ``read_documents`` takes it; the shipped sample if None
    :param lengths: input lengths in tokens, increasing, the longest within the context
    :param windows: target blocks of 32 tokens; the base's probabilities for all of them are kept:
        4 bytes x vocabulary x 32 x windows x lengths
    :param device: "auto", "cpu", "cuda" or "cuda:N"
    :return: settings and, per checkpoint, ``kl`` and ``perplexity`` by length, each with its
        standard error over windows, and each window's own (KL divergence, and negative
        log-likelihood) for paired comparisons
    :raises UserError: for inputs that make no sense, or a folder that is not quantized
    """
    where = resolve_device(device)
    source = models.resolve_model(base)
    context = models.context_length(models.load_config(source))
    tokenizer = models.load_tokenizer(source)
    prefix = special_prefix(tokenizer)
    _check_lengths(lengths, len(prefix), context)
    if windows < 1:
        raise UserError(f"--windows {windows}: give 1 or more")
    for folder in checkpoints:
        check_quantized(Path(folder))
    documents = read_documents(EVALUATION_SAMPLE if text is None else text)
    ids = [tokenize(tokenizer, document, prefix) for document in documents]
    spans = cut_spans(ids, lengths[-1] - len(prefix), windows)
    inputs = {
        length: [torch.tensor(span.input_of(length, prefix)) for span in spans]
        for length in lengths
    }
    reference = _target_log_probabilities(_load(source, where), inputs, "base")
    entries = [_entry("base", source, inputs, reference, reference)]
    for folder in checkpoints:
        name = Path(folder).name
        own = _target_log_probabilities(_load(str(folder), where), inputs, name)
        entries.append(_entry(name, str(folder), inputs, reference, own))
    return {
        "machine": record.machine(),
        "versions": record.versions(),
        "settings": {
            "base": base,
            "text": "the shipped evaluation sample" if text is None else str(text),
            "lengths": list(lengths),
            "windows": windows,
            "targets": TARGETS,
            "special_prefix": prefix,
        },
        "checkpoints": entries,
    }


def check_quantized(folder: Path) -> None:
    """Refuse a folder that is not a quantized checkpoint.

    :raises UserError: says what is missing
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a checkpoint (it has no config.json): give the folder that "
            "maca-llmc quantize wrote"
        )
    models.check_folder(folder)
    if getattr(models.read_config(str(folder)), "quantization_config", None) is None:
        raise UserError(f"{folder} is not a quantized checkpoint: make one with maca-llmc quantize")


def _check_lengths(lengths: Sequence[int], overhead: int, context: int | None) -> None:
    shown = ",".join(map(str, lengths))
    least = TARGETS + max(overhead, 1)  # each target is predicted from something
    if not lengths or sorted(set(lengths)) != list(lengths) or lengths[0] < least:
        raise UserError(f"lengths {shown}: give increasing lengths of {least} tokens or more")
    if context is not None and lengths[-1] > context:
        raise UserError(
            f"length {lengths[-1]} is longer than the model's context ({context}): lower it"
        )


def _load(source: str, device: torch.device) -> Any:
    config = models.read_config(source)
    quantized = getattr(config, "quantization_config", None) is not None
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    with quiet():
        model = models.load_model(source, config, torch.bfloat16, **extra)
    return model.to(device)


Inputs = dict[int, list[torch.Tensor]]


@torch.no_grad()
def _target_log_probabilities(
    model: Any, inputs: Inputs, name: str
) -> dict[int, list[torch.Tensor]]:
    """Log-probabilities over the vocabulary at each target, ``[TARGETS, V]`` float32 each."""
    result: dict[int, list[torch.Tensor]] = {length: [] for length in inputs}
    for length, ids in _with_progress(inputs, name):
        logits = model(input_ids=ids[None].to(model.device), logits_to_keep=TARGETS + 1).logits
        result[length].append(logits[0, :-1].float().log_softmax(dim=-1).cpu())
    return result


def _with_progress(inputs: Inputs, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    pairs = [(length, ids) for length, windows in inputs.items() for ids in windows]
    # in tokens, so that what is left is estimated with long inputs counted as long
    with tqdm.tqdm(total=sum(len(ids) for _, ids in pairs), desc=name, unit="token") as bar:
        for length, ids in pairs:
            yield length, ids
            bar.update(len(ids))


def _entry(
    name: str,
    path: str,
    inputs: Inputs,
    reference: dict[int, list[torch.Tensor]],
    own: dict[int, list[torch.Tensor]],
) -> dict[str, Any]:
    divergence, perplexity = {}, {}
    for length, windows in inputs.items():
        kl = [
            float((p.exp() * (p - q)).sum(-1).mean())
            for p, q in zip(reference[length], own[length], strict=True)
        ]
        nll = [
            -float(q.gather(1, ids[-TARGETS:, None]).mean())
            for q, ids in zip(own[length], windows, strict=True)
        ]
        mean, error = mean_and_error(kl)
        divergence[str(length)] = {"mean": mean, "stderr": error, "windows": kl}
        mean, error = mean_and_error(nll)
        perplexity[str(length)] = {
            "ppl": math.exp(mean),
            "stderr": math.exp(mean) * error,
            "nll": mean,
            "windows": nll,
        }
    return {"name": name, "path": path, "kl": divergence, "perplexity": perplexity}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over windows (0 for a single one)."""
    tensor = torch.tensor(values, dtype=torch.float64)
    error = float(tensor.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(tensor.mean()), error
