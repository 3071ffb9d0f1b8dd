"""Does a checkpoint still make sense at the end of its context? Through vLLM, against its base.

    .venv-serve/bin/python benchmarks/long_context.py runs/demo/base runs/demo/gptq runs/demo/maca

Runs ``maca-serve accuracy`` with perplexity and the two probes that need no data set (a number
hidden in text, a sequence repeated), at inputs of 1024 tokens and of the model's whole context, on
WikiText-2's test split from ``../shared/data``. Writes ``benchmarks/results/long_context.json``.
"""

import argparse
from pathlib import Path

from maca_serve import accuracy
from maca_serve.results import write_json
from tables import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "long_context.json"
TEXT = ROOT.parent / "shared" / "data" / "wikitext2_test_raw.txt"
LENGTHS = (1024, "context")
PROBES = ("needle", "copy")


def show(results: dict) -> str:
    """A Markdown table: a row for each checkpoint and length."""
    rows = [["checkpoint", "tokens", "perplexity"]]
    rows[0] += [f"{probe}: {what}" for probe in PROBES for what in ("exact", "nats per token")]
    for checkpoint in results["checkpoints"]:
        for length, perplexity in checkpoint["perplexity"].items():
            row = [checkpoint["name"], length, f"{perplexity['ppl']:.1f}"]
            for probe in PROBES:
                found = checkpoint["probes"][probe][length]
                row += [f"{found['exact']:.0%}", f"{-found['logprob']:.2f}"]
            rows.append(row)
    return markdown(rows)


def main() -> None:
    """Measure all, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="the base first")
    parser.add_argument("--windows", type=int, default=6, help="prompts of each length and kind")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file")
    given = parser.parse_args()
    results = accuracy(
        given.checkpoints, text=TEXT, lengths=LENGTHS, windows=given.windows, tasks=PROBES
    )
    write_json(given.results, results)
    print(show(results))


if __name__ == "__main__":
    main()
