"""Run vLLM's `vllm bench serve` many times in one process: a child of `maca_serve.speed.bench`.

Importing vLLM takes longer than a small benchmark, so it is imported once. This process parses
the arguments with the command's own parser and calls the function that the command calls. It
reads one JSON list of arguments per line from stdin and answers each with one line on its real
stdout: `{}` or `{"error": ...}`. All that vLLM prints goes to stderr.
"""

import json
import os
import sys


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        try:
            bench_serve(parser.parse_args(json.loads(line)))
        except (Exception, SystemExit) as error:  # the parent reports it, whatever it is
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        else:
            answers.write("{}\n")


if __name__ == "__main__":
    main()
