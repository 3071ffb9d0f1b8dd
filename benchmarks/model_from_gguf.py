"""Make a bfloat16 Hugging Face folder of a GGUF file, to compare calibration methods on it.

    .venv/bin/python benchmarks/model_from_gguf.py FILE.gguf FOLDER

Weights of a GGUF file have been rounded once already, so that absolute quality is not the model's
own. Where the file holds the embedding twice, once of them for the output, both become the finer
of the two: models this small tie them.
"""

import argparse
from pathlib import Path

from gguf import GGUFReader, TokenType
from transformers import AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import generate_merges

from maca_llmc.model.smollm2 import load_gguf


def convert(file: Path, target: Path) -> None:
    """Weights and configuration."""
    model = load_gguf(file.parent, file.name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        embedding.weight = head.weight
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(target)


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The file's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return gemma_tokenizer(file) if isinstance(tokenizer, GemmaTokenizer) else tokenizer


def gemma_tokenizer(file: Path) -> GemmaTokenizer:
    """Gemma's, whose merges a GGUF file does not hold and transformers 5.17 does not make anew.

    They follow from the scores of SentencePiece's tokens, as in any conversion of its models.
    Without them every letter is a token of its own.
    """
    fields = GGUFReader(file).fields
    tokens, scores, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    never_merged = [
        token
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (TokenType.CONTROL, TokenType.BYTE)
    ]
    merges = generate_merges(vocabulary, zip(tokens, scores, strict=True), never_merged)
    opens = bool(fields["tokenizer.ggml.add_bos_token"].contents())
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=opens)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    convert(arguments.file, arguments.folder)
    read_tokenizer(arguments.file).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
