"""How far a quantized model is from its base, by input length, in transformers.

On dequantized weights, so for any bit width: KL divergence to the base model, and perplexity, of
the same target tokens under inputs of several lengths, and multiple choice. What quantized
activations do (W8A8) is not in it: for that, measure in vLLM with ``maca-serve accuracy``.
"""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tqdm
from compressed_tensors.offload import remove_dispatch
from transformers import CompressedTensorsConfig

from maca_llmc.common import defaults, record
from maca_llmc.common.device import compute_on, fast_linears, resolve_device
from maca_llmc.common.errors import UserError
from maca_llmc.common.progress import quiet
from maca_llmc.common.resource_errors import named_memory
from maca_llmc.common.stats import mean_and_error, perplexity
from maca_llmc.common.tokens import special_tokens
from maca_llmc.data import read_documents
from maca_llmc.data.calibration import check_ids, tokenize
from maca_llmc.evaluation.choices import score_questions
from maca_llmc.evaluation.questions import Question, longest_prompt, prompt_tokens, read_questions
from maca_llmc.evaluation.windows import check_lengths, cut_spans, window_input
from maca_llmc.model import loading

TOKENS_AT_ONCE = 2048
"""Tokens of inputs of one length that go through a model together."""


Answer = tuple[int, torch.Tensor, torch.Tensor]
"""Input length, target ids ``[targets]``, and a model's logits for them ``[targets, V]``."""


def evaluate(
    base: str,
    checkpoints: Sequence[str | Path],
    *,
    text: Any = None,
    lengths: Sequence[int] = defaults.EVALUATION_LENGTHS,
    windows: int = defaults.EVALUATION_WINDOWS,
    targets: int = defaults.EVALUATION_TARGETS,
    tasks: Sequence[str | Path] = (),
    limit: int = defaults.EVALUATION_LIMIT,
    device: str = "auto",
) -> dict[str, Any]:
    """Compare checkpoints with their base model on the same target tokens.

    :param base: the unquantized model: a folder, a hub name or the embedded model's name
    :param checkpoints: folders of quantized models
    :param text: evaluation text, as ``read_documents`` takes it; the shipped sample if None
    :param lengths: input lengths in tokens, increasing, the longest within the context
    :param windows: how many spans of the longest length
    :param targets: tokens scored at the end of each; the base's answers to all of them are kept:
        2 bytes x vocabulary x targets x windows x lengths
    :param tasks: JSON Lines files of multiple choice, see ``questions.read_questions``
    :param limit: at most this many questions of each
    :param device: "auto", "cpu", "cuda" or "cuda:N"
    :return: settings and, per checkpoint, ``kl`` and ``perplexity`` by length, each with its
        standard error over windows, and each window's own (KL divergence, and negative
        log-likelihood) for paired comparisons; ``tasks`` by name as ``questions.grade``
    :raises UserError: for inputs that make no sense, or a folder that is not quantized
    """
    config = loading.load_config(loading.resolve_model(base))
    for folder in map(Path, checkpoints):  # all of them before any model is run
        check_same_model(base, config, folder, check_quantized(folder))
    _check_names([Path(folder).name for folder in checkpoints])
    with named_memory(
        "lower --windows, --targets or --lengths", "lower the longest of --lengths, or --device cpu"
    ):
        reference = Reference(
            base,
            text=text,
            lengths=lengths,
            windows=windows,
            targets=targets,
            tasks=tasks,
            limit=limit,
            device=device,
        )
        compared = [reference.compare(Path(folder)) for folder in checkpoints]
    return {
        "machine": record.machine(reference.device),
        "versions": record.versions(),
        "settings": reference.settings,
        "checkpoints": [reference.own, *compared],
    }


class Reference:
    """What a base model answers at the target tokens of a text, to compare checkpoints with.

    Parameters are those of :func:`evaluate`.
    """

    def __init__(
        self,
        base: str,
        *,
        text: Any,
        lengths: Sequence[int],
        windows: int,
        targets: int,
        tasks: Sequence[str | Path] = (),
        limit: int = defaults.EVALUATION_LIMIT,
        device: str = "auto",
    ) -> None:
        self.device = resolve_device(device)
        compute_on(self.device)
        source = loading.resolve_model(base)
        config = loading.load_config(source)
        context = loading.context_length(config)
        tokenizer = loading.load_tokenizer(source)
        prefix, _ = special_tokens(tokenizer)
        _check_counts(windows=windows, targets=targets, limit=limit)
        check_lengths(lengths, context, targets=targets, prefix=len(prefix))
        documents = read_documents(defaults.EVALUATION_SAMPLE if text is None else text)
        ids = [tokenize(tokenizer, document, prefix) for document in documents]
        spans = cut_spans(ids, len(prefix), lengths[-1], windows)
        self._targets = targets
        self._inputs = {
            length: torch.tensor([window_input(prefix, span, length) for span in spans])
            for length in lengths
        }
        self._questions = _read_tasks(tasks, tokenizer, limit, context)
        questions = [q for found in self._questions.values() for q in found]
        prompts = [prompt for question in questions for prompt in question.prompts]
        rows = config.get_text_config().vocab_size
        check_ids([*spans, *prompts], tokenizer, rows, base)
        self.settings = {
            "base": base,
            "text": "the shipped evaluation sample" if text is None else str(text),
            "lengths": list(lengths),
            "windows": windows,
            "targets": targets,
            "tasks": {name: len(questions) for name, questions in self._questions.items()},
            "special_prefix": prefix,
        }
        self._logits: dict[int, list[torch.Tensor]] = {length: [] for length in lengths}
        model = load_dequantized(source, self.device)
        for length, _, logits in self._answers(model, "base"):
            self._logits[length].append(logits)
        self.own = self._entry("base", source, self._replayed(), model)
        """The base's own entry, of the form that :meth:`compare` gives."""

    def compare(self, folder: Path) -> dict[str, Any]:
        """Name, path, ``kl`` and ``perplexity`` by length, and ``tasks``, of a checkpoint."""
        gc.collect()  # models that were dequantized hold themselves, and two may be too much
        model = load_dequantized(str(folder), self.device)
        answers = self._answers(model, folder.name)
        return self._entry(folder.name, str(folder), answers, model)

    @torch.no_grad()
    def _answers(self, model: Any, name: str) -> Iterator[Answer]:
        total = sum(ids.numel() for ids in self._inputs.values())
        # in tokens, so that what is left is estimated with long inputs counted as long
        with tqdm.tqdm(total=total, desc=name, unit="token") as bar:
            for length, ids in self._inputs.items():
                for batch in ids.split(max(1, TOKENS_AT_ONCE // length)):
                    with fast_linears(model.device):
                        output = model(batch.to(model.device), logits_to_keep=self._targets + 1)
                    for window, logits in zip(batch, output.logits[:, :-1].cpu(), strict=True):
                        yield length, window[-self._targets :], logits
                    bar.update(batch.numel())

    def _replayed(self) -> Iterator[Answer]:
        for length, ids in self._inputs.items():
            for window, logits in zip(ids, self._logits[length], strict=True):
                yield length, window[-self._targets :], logits

    def _choose(self, model: Any, name: str) -> dict[str, Any]:
        total = sum(map(prompt_tokens, self._questions.values()))
        with tqdm.tqdm(total=total, desc=f"{name}, tasks", unit="token", disable=not total) as bar:
            return {
                task: score_questions(model, questions, TOKENS_AT_ONCE, bar.update)
                for task, questions in self._questions.items()
            }

    def _entry(self, name: str, path: str, answers: Iterator[Answer], model: Any) -> dict[str, Any]:
        kl: dict[int, list[float]] = {length: [] for length in self._inputs}
        nll: dict[int, list[float]] = {length: [] for length in self._inputs}
        for length, targets, logits in answers:
            p = self._logits[length][len(kl[length])].float().log_softmax(dim=-1)
            q = logits.float().log_softmax(dim=-1)
            kl[length].append(float((p.exp() * (p - q)).sum(-1).mean()))
            nll[length].append(-float(q.gather(1, targets[:, None]).mean()))
        return {
            "name": name,
            "path": path,
            "kl": {str(length): _divergence(values) for length, values in kl.items()},
            "perplexity": {
                str(length): perplexity(values) | {"windows": values}
                for length, values in nll.items()
            },
            "tasks": self._choose(model, name),
        }


def check_quantized(folder: Path) -> Any:
    """The configuration of a quantized checkpoint; any other folder is refused.

    :raises UserError: says what is missing
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a checkpoint (it has no config.json): give the folder that "
            "maca-llmc quantize wrote"
        )
    loading.check_folder(folder)
    config = loading.read_config(str(folder))
    if getattr(config, "quantization_config", None) is None:
        raise UserError(f"{folder} is not a quantized checkpoint: make one with maca-llmc quantize")
    return config


def check_same_model(base: str, config: Any, folder: Path, own: Any) -> None:
    """Refuse a checkpoint that was made from another model.

    :param config: the base's; so ``own`` the checkpoint's
    :raises UserError: names what differs
    """
    for field in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        one, other = (getattr(c.get_text_config(), field, None) for c in (config, own))
        if one != other:
            raise UserError(
                f"{folder} was not made from {base}: {field} is {other} in it and {one} in the "
                "base; give the model that was quantized"
            )


def _check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two checkpoints are named {name}: give each once, rename a folder")


def _check_counts(windows: int, targets: int, limit: int) -> None:
    # One window has no standard error.
    least = {"windows": (windows, 2), "targets": (targets, 1), "limit": (limit, 1)}
    for flag, (value, smallest) in least.items():
        if value < smallest:
            raise UserError(f"--{flag} {value}: give {smallest} or more")


def _read_tasks(
    tasks: Sequence[str | Path], tokenizer: Any, limit: int, context: int | None
) -> dict[str, list[Question]]:
    """Questions by the file's name without its ending."""
    found: dict[str, list[Question]] = {}
    for path in map(Path, tasks):
        if not path.is_file():
            raise UserError(
                f"--tasks {path}: no such file (built-in and lm-eval tasks are maca-serve "
                "accuracy's)"
            )
        if path.stem in found:
            raise UserError(f"--tasks {path}: a task {path.stem!r} is there already: rename one")
        found[path.stem] = read_questions(path, tokenizer, limit)
        longest = longest_prompt(found[path.stem])
        if context is not None and longest > context:
            raise UserError(
                f"--tasks {path}: a question of {longest} tokens is longer than the model's "
                f"context ({context}): leave it out"
            )
    return found


def load_dequantized(source: str, device: torch.device) -> Any:
    """A model in bfloat16, quantized or not; what was quantized is computed with at 16 bits.

    :param source: folder or hub name, see ``models.resolve_model``
    :raises UserError: for one that rotates while it runs, which transformers does not do
    """
    config = loading.read_config(source)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized:
        _check_rotations(source, config.quantization_config)
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    with quiet():
        model = loading.load_model(source, config, torch.bfloat16, **extra)
    # what compressed-tensors dequantized it would hand out on the CPU, wherever it lies
    return remove_dispatch(model).to(device)


def _check_rotations(source: str, quantization: dict[str, Any]) -> None:
    groups = (quantization.get("transform_config") or {}).get("config_groups") or {}
    for name, group in groups.items():
        if any(not part["location"].startswith("weight_") for part in group["apply"]):
            raise UserError(
                f"{source} rotates activations while it runs ({name}), which transformers leaves "
                "out: measure it with maca-serve accuracy"
            )


def _divergence(windows: list[float]) -> dict[str, Any]:
    mean, error = mean_and_error(windows)
    return {"mean": mean, "stderr": error, "windows": windows}
