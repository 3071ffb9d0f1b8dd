"""Short and long prompts of the package's English sample, the same for every checkpoint."""

from maca_llmc.common.errors import UserError
from maca_llmc.evaluation.windows import cut_spans, window_input
from maca_serve.evaluation.corpus import load_tokenizer, read_corpus, tokenize
from maca_serve.formats.checkpoint import Checkpoint

# Tokens of a prompt: how many there are. Many short ones, for their means to say something.
COUNTS = {32: 8, 128: 4, 512: 2, 2048: 1}
NEW_TOKENS = 16

Prompt = list[int]


def make_prompts(checkpoint: Checkpoint) -> list[Prompt]:
    """Token ids, shortest first; lengths that do not fit into the model's context are left out.

    Raises:
        UserError: no tokenizer, or a context that is too short for the shortest.
    """
    context = checkpoint.context
    lengths = [n for n in COUNTS if context is None or n + NEW_TOKENS <= context]
    if not lengths:
        raise UserError(
            f"{checkpoint.path}: its context of {context} tokens is too short for prompts of"
            f" {min(COUNTS)} and {NEW_TOKENS} new ones; a model with a longer one can be verified"
        )
    tokens = tokenize(load_tokenizer(checkpoint.path), read_corpus())
    return [
        window_input(tokens.prefix, span, length)
        for length in lengths
        for span in cut_spans(tokens.documents, len(tokens.prefix), length, COUNTS[length])
    ]
