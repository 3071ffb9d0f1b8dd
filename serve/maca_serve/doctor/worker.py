"""Ask vLLM which kernels it would choose: a child process of `maca_serve.doctor.asking`.

Reads one JSON question from stdin and writes one JSON answer to its real stdout; all that vLLM
prints goes to stderr. The question:

    config          model config with `architectures` and `quantization_config`
    sizes           {module: [output features, input features]} by the checkpoint's names
    quantized       names of the modules that are stored quantized
    capabilities    of the cards to ask about, 90 for 9.0; null for this machine
    tensor_parallel size of the tensor-parallel group
    variants        [{"change", "quantization_config", "tensor_parallel", "dtype"}] to try as well

    tensors         {name: [type, shape]} of the checkpoint, or of one that is planned
    whole           whether these are all that it has

Variants are tried on one layer of each look. The answer is {"answers": [one for each card]}, for
which vLLM is imported once. Each has `vllm`, `target`, `unasked` (why the model's layers are not
known, or null), `refused` (why vLLM would not even start, or null), `layers`, one entry for each of
vLLM's layers, `unasked_experts` ([{"reason", "modules"}]), `attention` (see
`maca_serve.doctor.attention`, null where not asked), `loading` (see `maca_serve.doctor.loading`,
null where there were no tensors), and `variants`, with the layers of each.

A question {"load": [{"config", "tensors"}]} is about the tensors of whole checkpoints only; its
answer is {"loaded": [as `loading`]}.
"""

import json
import os
import sys
from typing import Any

from maca_serve.engine.fit import WEIGHTS_ONLY

Answer = dict[str, Any]


def main() -> None:
    """Answer one question."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for name, value in WEIGHTS_ONLY.items():  # some kernels ask for it; the caller's own stands
        os.environ.setdefault(name, value)
    import torch

    torch.set_num_threads(1)  # more would be missing in a fork
    json.dump(_answer(json.load(sys.stdin)), answers)
    answers.flush()


def _answer(question: Answer) -> Answer:
    from maca_serve.doctor.loading import try_loading
    from maca_serve.doctor.selection import answer

    if "load" in question:
        return {"loaded": [try_loading(one["config"], one["tensors"]) for one in question["load"]]}
    return answer(question)


if __name__ == "__main__":
    main()
