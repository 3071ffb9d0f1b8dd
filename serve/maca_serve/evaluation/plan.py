"""Everything that accuracy needs, prepared and checked before any engine starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maca_llmc.common.errors import UserError
from maca_llmc.common.tokens import special_tokens
from maca_llmc.evaluation.questions import (
    Question,
    longest_prompt,
    prompt_tokens,
    read_questions,
)
from maca_llmc.evaluation.windows import TARGETS
from maca_serve.engine.client import Client
from maca_serve.evaluation.corpus import (
    Corpus,
    Tokens,
    load_tokenizer,
    read_corpus,
    tokenize,
)
from maca_serve.evaluation.harness import USUAL, USUAL_TASKS, Harness, open_harness
from maca_serve.evaluation.perplexity import Inputs, count_tokens, score_perplexity, window_inputs
from maca_serve.evaluation.probes import (
    COPY,
    NEEDLE,
    Probes,
    count_probe_tokens,
    depths,
    make_probes,
    score_probes,
)
from maca_serve.evaluation.tasks import (
    CONTINUATION,
    make_continuations,
    score_questions,
)
from maca_serve.evaluation.windows import resolve_lengths
from maca_serve.formats.checkpoint import Checkpoint
from maca_serve.measuring.settings import AccuracySettings

OWN = (CONTINUATION, NEEDLE, COPY)


@dataclass(frozen=True)
class AccuracyPlan:
    """The same token ids for every checkpoint.

    Attributes:
        settings: as asked, the lengths as numbers.
        corpus: the evaluation text.
        prefix: special tokens that the tokenizer puts before every prompt.
        inputs: perplexity windows by length.
        questions: local multiple-choice tasks by name.
        probes: needle and copy prompts by name and length.
        harness: lm-eval tasks, or None.
    """

    settings: AccuracySettings
    corpus: Corpus
    prefix: list[int]
    inputs: Inputs
    questions: dict[str, list[Question]]
    probes: dict[str, Probes]
    harness: Harness | None

    @property
    def tokens(self) -> int:
        """Prompt tokens of one checkpoint's windows, questions and probes."""
        questions = sum(map(prompt_tokens, self.questions.values()))
        probes = sum(map(count_probe_tokens, self.probes.values()))
        return count_tokens(self.inputs) + questions + probes

    @property
    def longest(self) -> int:
        """Tokens of the longest request: its prompt, and one of output."""
        return 1 + max([*self.inputs, *map(longest_prompt, self.questions.values())])

    def describe(self) -> dict[str, Any]:
        """The settings as they go into results."""
        return {
            "text": str(self.corpus.path),
            "text_sha256": self.corpus.sha256,
            "lengths": list(self.inputs),
            "windows": self.settings.windows,
            "targets_per_window": TARGETS,
            "tasks": list(self.settings.tasks),
            "limit": self.settings.limit,
            "seed": self.settings.seed,
            "special_tokens": self.prefix,
            "chat_template": None,
            "needle_depths": depths(self.settings.windows) if NEEDLE in self.probes else None,
        }

    def score(
        self, checkpoint: Checkpoint, client: Client, url: str, advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Measure one checkpoint on its running engine.

        Args:
            checkpoint: what is served.
            client: of the engine.
            url: the engine's, for lm-eval.
            advance: called with the prompt tokens of each finished request.

        Returns:
            {"perplexity": by length, "tasks": by name, "probes": by name and length}.
        """
        perplexity = score_perplexity(client, self.inputs, advance)
        tasks: dict[str, Any] = {
            name: score_questions(client, questions, advance)
            for name, questions in self.questions.items()
        }
        probes = {
            name: score_probes(client, prompts, advance) for name, prompts in self.probes.items()
        }
        if self.harness is not None:
            tasks |= self.harness.score(
                checkpoint,
                client,
                url,
                limit=self.settings.limit,
                seed=self.settings.seed,
                special_tokens=bool(self.prefix),
            )
        return {"perplexity": perplexity, "tasks": tasks, "probes": probes}


def plan_accuracy(settings: AccuracySettings, checkpoints: list[Checkpoint]) -> AccuracyPlan:
    """Read the text and the tasks, and encode them once for all checkpoints.

    Args:
        settings: what to measure.
        checkpoints: one or more; the first one's tokenizer encodes.

    Raises:
        UserError: lengths that do not fit, text or tasks that cannot be used, or checkpoints
            whose tokenizers disagree.
    """
    contexts = [checkpoint.context for checkpoint in checkpoints if checkpoint.context]
    context = min(contexts, default=None)
    lengths = resolve_lengths(settings.lengths, context)
    settings = replace(settings, lengths=lengths)
    corpus = read_corpus(Path(settings.text) if settings.text else None)
    files, named = _sort_tasks(settings.tasks)
    first = checkpoints[0]
    tokenizer = load_tokenizer(first.path)
    tokens = tokenize(tokenizer, corpus)
    inputs = window_inputs(tokens, lengths, settings.windows)
    for other in checkpoints[1:]:
        _require_same_tokens(first, tokens, other, corpus)
    limit, seed = settings.limit, settings.seed
    questions: dict[str, list[Question]] = {}
    if CONTINUATION in settings.tasks:
        questions[CONTINUATION] = make_continuations(tokens, tokenizer, limit, seed)
    for path in files:
        questions[path.stem] = read_questions(path, tokenizer, limit, seed)
    probes = {
        kind: make_probes(kind, tokens, tokenizer, lengths, settings.windows, seed)
        for kind in (NEEDLE, COPY)
        if kind in settings.tasks
    }
    if named:
        _require_no_ending(first, tokenizer, named[0])
    harness = open_harness(named) if named else None
    plan = AccuracyPlan(settings, corpus, tokens.prefix, inputs, questions, probes, harness)
    _require_questions_fit(plan, context)
    return plan


def _sort_tasks(tasks: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, and names for lm-eval."""
    files = [Path(name) for name in tasks if Path(name).is_file()]
    named = [
        task
        for name in tasks
        if not Path(name).is_file() and name not in OWN
        for task in (USUAL_TASKS if name == USUAL else (name,))
    ]
    for name in named:
        if name.endswith(".jsonl") or "/" in name:
            raise UserError(f"--tasks: {name}: no such file")
    titles = [path.stem for path in files] + named
    for title in titles:
        if titles.count(title) > 1 or title in (*OWN, "mean"):
            raise UserError(
                f"--tasks: the name {title!r} is taken; rename the file, or ask for it once"
            )
    return files, named


def _require_same_tokens(
    first: Checkpoint, tokens: Tokens, other: Checkpoint, corpus: Corpus
) -> None:
    if tokenize(load_tokenizer(other.path), corpus) != tokens:
        raise UserError(
            f"{other.path}: its tokenizer gives other token ids than that of {first.path}:"
            " their perplexities cannot be compared"
        )


def _require_no_ending(checkpoint: Checkpoint, tokenizer: Any, task: str) -> None:
    """Refuse lm-eval where it would put EOS between a question and its choices."""
    if special_tokens(tokenizer)[1]:
        raise UserError(
            f"--tasks: {task}: the tokenizer of {checkpoint.path} ends every text with EOS, which"
            " lm-eval takes for the end of each choice; give a JSONL file of `question`, `choices`,"
            " `answer`"
        )


def _require_questions_fit(plan: AccuracyPlan, context: int | None) -> None:
    for name, questions in plan.questions.items():
        longest = longest_prompt(questions)
        if context is not None and longest > context:
            raise UserError(
                f"--tasks: {name} has a question of {longest} tokens, longer than the model's"
                f" context {context}"
            )
