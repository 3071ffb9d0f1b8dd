"""Make a bfloat16 Hugging Face folder of a GGUF file, to compare calibration methods on it.

    python3 benchmarks/model_from_gguf.py FILE.gguf FOLDER [--tokenizer FOLDER] [--bos TOKEN]

Weights of a GGUF file have been rounded once already, so that absolute quality is not the model's
own. Where the file holds the embedding twice, once of them for the output, both become the finer
of the two: models this small tie them.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from maca_llmc.smollm2 import load_gguf


def convert(file: Path, target: Path) -> None:
    """Weights and configuration."""
    model = load_gguf(file.parent, file.name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        embedding.weight = head.weight
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(target)


def read_tokenizer(file: Path, folder: Path | None, bos: str | None) -> PreTrainedTokenizerFast:
    """The file's own tokenizer, or that of a folder with ``tokenizer.json``."""
    if folder is None:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    if bos is not None:
        tokenizer.bos_token = bos
    return tokenizer


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer.json to take")
    parser.add_argument("--bos", help="its begin-of-text token")
    arguments = parser.parse_args()
    convert(arguments.file, arguments.folder)
    tokenizer = read_tokenizer(arguments.file, arguments.tokenizer, arguments.bos)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
