"""Run `make demo` as a stranger would, and keep its numbers with what it cost.

    python3 benchmarks/demo.py [RESULT.json]        # default: benchmarks/results/demo.json

Writes the demo's own results with wall time in seconds and peak resident memory of its largest
process in bytes, and prints the table that the README quotes. Run it on an otherwise idle machine.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "benchmarks" / "results" / "demo.json"


def run_demo() -> dict:
    """Results of one demo run, after set-up."""
    subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    start = time.perf_counter()
    subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    return {
        "command": "make demo",
        "wall_seconds": round(time.perf_counter() - start),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        **json.loads((ROOT / "runs/demo/results.json").read_text()),
    }


def table(results: dict) -> str:
    """Markdown: one row per checkpoint."""
    entries = results["checkpoints"]
    lengths = list(entries[0]["perplexity"])
    loads = list(entries[0]["throughput"])
    head = [
        "checkpoint", "scheme", "MB", *(f"perplexity at {n}" for n in lengths), "recovery %",
        *(f"tokens/s at {n} in flight" for n in loads),
    ]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for entry in entries:
        rows.append(
            [
                entry["name"],
                entry["scheme"],
                f"{entry['size_bytes'] / 1e6:.0f}",
                *(f"{entry['perplexity'][n]['ppl']:.1f}" for n in lengths),
                f"{entry['recovery']['perplexity']['mean']:.1f}",
                *(f"{entry['throughput'][n]['output_tokens_per_s']:.1f}" for n in loads),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Run, write, print."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    results = run_demo()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
