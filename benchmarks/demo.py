"""Keep the numbers of the last `make demo` with what it cost, and print the README's table.

    make demo && .venv/bin/python benchmarks/demo.py      # writes benchmarks/results/demo.json

Run the demo on an otherwise idle machine: timings on two cores suffer from anything beside them.
Times are in seconds, memory in bytes.
"""

import json
from pathlib import Path

from tables import markdown

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "runs" / "demo"
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
KEPT = ("method", "calibration", "wall_seconds", "peak_rss_bytes", "versions", "machine")


def collect() -> dict:
    """The demo's results, each quantized checkpoint with how it was made."""
    results = json.loads((DEMO / "results.json").read_text())
    text = Path(results["settings"]["accuracy"]["text"])
    results["settings"]["accuracy"]["text"] = text.name  # not where it lay on this machine
    for entry in results["checkpoints"]:
        entry.pop("path")
        record = DEMO / entry["name"] / "maca_run.json"
        if record.is_file():
            run = json.loads(record.read_text())
            entry["quantize"] = {key: run[key] for key in KEPT}
    return results


def table(results: dict) -> str:
    """Markdown: one row per checkpoint."""
    entries = results["checkpoints"]
    lengths = list(entries[0]["perplexity"])
    length = next(iter(entries[0]["throughput"]))
    loads = list(entries[0]["throughput"][length])
    rows = [
        ["checkpoint", "scheme", "MB", *(f"perplexity at {n}" for n in lengths), "recovery"]
        + [f"tokens/s, {n} in flight" for n in loads]
        + ["quantized in"]
    ]
    for entry in entries:
        made = entry.get("quantize")
        rows.append(
            [entry["name"], entry["scheme"].split(",")[0], f"{entry['size_bytes'] / 1e6:.0f}"]
            + [f"{entry['perplexity'][n]['ppl']:.1f}" for n in lengths]
            + [f"{entry['recovery']['perplexity']['mean']:.1f} %"]
            + [f"{entry['throughput'][length][n]['output_tokens_per_s']:.1f}" for n in loads]
            + [f"{made['wall_seconds']['calibrate']:.0f} s" if made else "—"]
        )
    return markdown(rows)


def main() -> None:
    """Write the result file and print the table."""
    results = collect()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
