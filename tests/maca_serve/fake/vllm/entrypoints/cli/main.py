"""`vllm serve`, with what the environment variable FAKE_VLLM asks for going wrong."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vllm.model import logprob, other_tokens

# "does not start for w4" is of one checkpoint, "does not start later for w4" of its second engine.
FAULT, _, ONLY = os.environ.get("FAKE_VLLM", "").partition(" for ")
if ONLY and ONLY not in sys.argv:
    FAULT = ""
OPTIONS = argparse.Namespace()
KEY = os.environ.get("VLLM_API_KEY")
LOG = """\
(EngineCore pid=8) INFO 11-22 00:28:04 [core.py:1] Initializing a V1 LLM engine (v0.32.0) with \
config: model='m', skip_tokenizer_init=False, dtype=torch.bfloat16, max_seq_len=512, seed=0
(Worker pid=7) INFO 11-22 00:28:05 [x.py:1] Using CPUWNA16LinearKernel for mixed-precision linear
(Worker pid=7) INFO 11-22 00:28:05 [x.py:1] Using CPUWNA16LinearKernel for CompressedTensorsWNA16
(Worker pid=7) INFO 11-22 00:28:05 [x.py:1] Explicitly set (1.0/23.54) GiB for KV cache on node 0.
(EngineCore pid=8) INFO 11-22 00:28:05 [x.py:1] CPU KV cache size: 46,592 tokens, Maximum \
concurrency for 8,192 tokens per request: 5.69x
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        model = {"max_model_len": OPTIONS.max_model_len}
        self.answer(200, {"data": [model]} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if KEY and self.headers["Authorization"] != f"Bearer {KEY}":
            return self.answer(401, {"error": "Unauthorized"})
        if "prompt_logprobs" not in body:
            # one write, or lines of requests that come at once would mix
            print(f"request {json.dumps(body)}\n", end="", flush=True)
        phase = "scoring" if "prompt_logprobs" in body else "bench"
        match FAULT.split(f" in {phase}"):
            case ["stalls", _]:
                stall()
            case ["killed", _]:
                os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "dies" or (FAULT == "dies in bench" and "prompt_logprobs" not in body):
            print(
                "(EngineCore pid=8) ERROR 11-22 00:28:05 [x.py:1] MemoryError: no room", flush=True
            )
            os._exit(1)
        if FAULT == "refuses":
            return self.answer(400, {"error": {"message": "prompt too long"}})
        if FAULT == "nan":  # as vLLM 0.32 answers where a log-probability is no number
            message = "Out of range float values are not JSON compliant"
            return self.answer(400, {"error": {"message": message, "type": "BadRequestError"}})
        top = body.get("prompt_logprobs", 0)
        shift = 0.5 if FAULT == "depends on the batch" and len(body["prompt"]) == 1 else 0.0
        choices = [
            {
                "index": i,
                "prompt_logprobs": entries(ids, top, shift),
                "token_ids": [0] * body.get("max_tokens", 0),
                "text": " ".join(f"w{token}" for token in ids[-2:]),
                "logprobs": echoed(ids) if body.get("echo") else None,
            }
            for i, ids in enumerate(body["prompt"])
        ]
        # Out of order, as the protocol allows.
        return self.answer(200, {"choices": choices[::-1]})

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def stall():
    """Say that the place was reached, and stay there."""
    Path(os.environ["FAKE_VLLM_REACHED"]).touch()
    time.sleep(600)


def entries(ids, top, shift):
    others = {str(token): {"logprob": value} for token, value in other_tokens(top).items()}
    found = [
        {**others, str(ids[i]): {"logprob": logprob(ids, i) - shift}} for i in range(1, len(ids))
    ]
    if FAULT == "minus infinity":
        found[-1][str(ids[-1])]["logprob"] = -9999.0
    return [None, *found]


def echoed(ids):
    """As lm-eval asks for them: the prompt's own, and one made up for the generated token."""
    own = [None, *(logprob(ids, i) for i in range(1, len(ids))), -1.0]
    return {
        "token_logprobs": own,
        "top_logprobs": [None if value is None else {"a": value} for value in own],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int, default=8192)
    options, others = parser.parse_known_args(namespace=OPTIONS)
    if "--no-such-flag" in others:
        parser.error("unrecognized arguments: --no-such-flag")
    print(f"arguments {sys.argv[1:]}", flush=True)
    if FAULT == "does not start later":
        started = Path(os.environ["FAKE_VLLM_REACHED"])
        later, _ = started.exists(), started.touch()
    if FAULT == "does not start" or (FAULT == "does not start later" and later):
        print("(Worker pid=9) ERROR 11-22 00:28:05 [x.py:1] ValueError: no kernel for 3 bits")
        print("(APIServer pid=1) RuntimeError: Engine core initialization failed. See above.")
        sys.exit(1)
    # A worker that outlives its parent unless it is killed too.
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"worker {worker.pid}", flush=True)
    print(LOG, end="", flush=True)
    if FAULT == "hangs":
        stall()
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
