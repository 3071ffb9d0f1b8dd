"""`vllm bench serve`: sends one request, and writes numbers that a test can recognise."""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

OPTIONS = ("backend", "base-url", "model", "tokenizer", "dataset-name", "percentile-metrics")
FILES = ("metric-percentiles", "result-dir", "result-filename")
NUMBERS = ("random-input-len", "random-output-len", "num-prompts", "num-warmups")
OTHERS = ("seed", "temperature")


def add_cli_args(parser):
    for option in OPTIONS + FILES:
        parser.add_argument(f"--{option}", required=True)
    for option in NUMBERS + OTHERS:
        parser.add_argument(f"--{option}", type=int, required=True)
    loads = parser.add_mutually_exclusive_group(required=True)
    loads.add_argument("--max-concurrency", type=int)
    loads.add_argument("--request-rate", type=float)
    for flag in ("--ignore-eos", "--save-result", "--disable-tqdm"):
        parser.add_argument(flag, action="store_true", required=True)


def main(args):
    print("the benchmark prints to stdout")
    if os.environ.get("FAKE_VLLM") == "bench fails":
        raise ValueError("no such data set")
    body = json.dumps({"prompt": [[1, 2]], "max_tokens": args.random_output_len}).encode()
    failed = 0
    try:
        urllib.request.urlopen(f"{args.base_url}/v1/completions", body).read()
    except (OSError, urllib.error.URLError):
        failed = args.num_prompts
    if os.environ.get("FAKE_VLLM") == "bench drops":
        failed = 1
    speed = args.max_concurrency or 2 * args.request_rate
    result = {
        "completed": args.num_prompts - failed,
        "failed": failed,
        "num_prompts": args.num_prompts,
        "output_throughput": 10.0 * speed,
        "total_token_throughput": 50.0 * speed,
        "request_throughput": 2.0 * speed,
        "duration": 2.0,
    }
    for place, metric in enumerate(args.percentile_metrics.split(","), start=1):
        for name in ["mean", "median", *(f"p{p}" for p in args.metric_percentiles.split(","))]:
            result[f"{name}_{metric}_ms"] = 100.0 * place
    (Path(args.result_dir) / args.result_filename).write_text(json.dumps(result))
