"""Ask vLLM which kernels it would choose: a child process of `maca_serve.doctor.asking`.

Reads one JSON question from stdin and writes one JSON answer to its real stdout; all that vLLM
prints goes to stderr. The question:

    config          model config with `architectures` and `quantization_config`
    sizes           {module: [output features, input features]} by the checkpoint's names
    quantized       names of the modules that are stored quantized
    capabilities    of the cards to ask about, 90 for 9.0; null for this machine
    tensor_parallel size of the tensor-parallel group
    variants        [{"change", "quantization_config", "tensor_parallel", "dtype"}] to try as well

Variants are tried on one layer of each look. The answer is {"answers": [one for each card]}, for
which vLLM is imported once. Each has `vllm`, `target`, `unasked` (why the model's layers are not
known, or null), `refused` (why vLLM would not even start, or null), `layers`, one entry for each of
vLLM's layers, `unasked_experts` ([{"reason", "modules"}]), `attention` (see
`maca_serve.doctor.attention`, null where not asked), and `variants`, with the layers of each.
"""

import json
import os
import sys
from typing import Any

from maca_serve.fit import WEIGHTS_ONLY

Answer = dict[str, Any]


def main() -> None:
    """Answer one question."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for name, value in WEIGHTS_ONLY.items():  # some kernels ask for it; the caller's own stands
        os.environ.setdefault(name, value)
    import torch

    from maca_serve.doctor.selection import answer

    torch.set_num_threads(1)  # more would be missing in a fork
    json.dump(answer(json.load(sys.stdin)), answers)
    answers.flush()


if __name__ == "__main__":
    main()
