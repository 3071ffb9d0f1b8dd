"""Tiny tokenizers made in memory, and words to feed them: one word is one token."""

import pytest
from loguru import logger
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(400)]
SPECIALS = ["<unk>", "<bos>", "<user>", "<assistant>", "<end>", "a"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"


def build_tokenizer(
    bos: bool = False, chat_template: str | None = None, single: str = "<bos> $A"
) -> PreTrainedTokenizerFast:
    """Make one; ``single`` is what ``bos`` makes of a text."""
    vocabulary = {word: index for index, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(name, vocabulary[name]) for name in ("<bos>", "<end>")]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>" if bos else None,
        chat_template=chat_template,
        model_max_length=64,  # longer documents must pass, and quietly
    )


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def plain():
    return build_tokenizer()


@pytest.fixture
def with_bos():
    return build_tokenizer(bos=True)


@pytest.fixture
def chatty():
    """Its chat template writes the BOS token itself, as Llama's does."""
    return build_tokenizer(bos=True, chat_template="<bos> " + TEMPLATE)


@pytest.fixture
def documents():
    """Ten documents of 40 words; no word occurs twice, so that reuse shows."""
    return [" ".join(WORDS[start : start + 40]) for start in range(0, 400, 40)]


@pytest.fixture
def warnings():
    """What is logged as a warning, in order."""
    seen = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level="WARNING")
    yield seen
    logger.remove(sink)
