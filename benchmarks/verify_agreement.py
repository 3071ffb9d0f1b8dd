"""How far vLLM and transformers lie apart on the same checkpoint, low-bit and BF16.

    .venv-serve/bin/python benchmarks/verify_agreement.py runs/demo/base runs/demo/maca ...

Runs ``maca-serve verify`` on the unquantized model and on every checkpoint, two minutes each for
SmolLM2-135M on two cores, and writes ``benchmarks/results/verify_agreement.json`` after each. The
last column but one is the mean absolute difference of log-probabilities between vLLM and
transformers in bfloat16, over that of the unquantized model.
"""

import argparse
from pathlib import Path

from maca_serve import verify
from maca_serve.common.results import write_json
from tables import markdown

RESULTS = Path(__file__).parent / "results" / "verify_agreement.json"
MEAN = "log-probabilities, mean"


def row(result: dict, base: dict) -> list[str]:
    """One checkpoint's line."""
    checks = {check["name"]: check for check in result["checks"]}
    failed = [name for name, check in checks.items() if check["status"] == "fail"]
    if MEAN not in checks:
        why = [check["found"] for check in checks.values() if check["status"] != "pass"]
        return [result["name"], result["kernel"], "", "", "", "", f"not compared: {why[0]}"]
    numbers = checks[MEAN]["numbers"]
    apart, own = numbers["from_bfloat16"], _apart(base)
    return [
        result["name"],
        result["kernel"],
        f"{numbers['ratio']:.2f}",
        f"{checks['first choices']['numbers']['agreement']:.1%}",
        f"{apart:.4f}",
        f"{apart / own:.2f}" if own else "",
        ", ".join(failed) or "none",
    ]


def _apart(result: dict) -> float | None:
    """None where it was not compared, for want of memory for instance."""
    check = next((check for check in result["checks"] if check["name"] == MEAN), None)
    return float(check["numbers"]["from_bfloat16"]) if check else None


def show(results: list[dict]) -> str:
    """A Markdown table; the first is the unquantized model."""
    columns = ["checkpoint", "kernel", "from float32, x bfloat16 alone", "first choices"]
    columns += ["vLLM from transformers, nats", "over BF16's", "failed checks"]
    return markdown([columns, *(row(result, results[0]) for result in results)])


def main() -> None:
    """Verify all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="the unquantized model")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file")
    given = parser.parse_args()
    found: list[dict] = []
    for folder in (given.base, *given.checkpoints):
        result = verify(folder)
        result.pop("path")
        found.append(result)
        write_json(given.results, {"checkpoints": found})
    print(show(found))


if __name__ == "__main__":
    main()
