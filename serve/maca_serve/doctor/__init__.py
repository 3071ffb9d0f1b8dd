"""`maca-serve doctor`: will vLLM load this checkpoint on that target, and with which kernels.

Two halves that meet in one JSON message. This side reads files and knows the formats, not vLLM:

    headers.py    safetensors headers of a folder
    layouts.py    the tensors that each storage format gives a module
    schemes.py    which quantization arguments a module has
    checks.py     tensors against scheme
    straddling.py words that ranks or fusing would tear apart
    traps.py      kernels that say yes and fail
    speeds.py     kernels that were measured to be slower than 16 bits
    variants.py   what could be changed
    layer_problems.py  what is wrong with one layer
    loadable.py   what vLLM's loader made of the tensors, also at the start of a run
    findings.py   what it all means
    diagnosis.py  from a folder or a file of shapes to the findings; view.py shows them

The other half runs in a process of its own, because it turns vLLM's platform into another one and
because vLLM prints to standard output:

    worker.py     reads the question of asking.py, writes the answer
    selection.py  asks about every layer, on each card in a fork of its own (forking.py)
    simulation.py a card that is not here, and packages that are not here
    fusing.py     the layers that vLLM's model makes of the checkpoint's modules
    building.py   vLLM's own linear layer of one shape, without memory
    experts.py    vLLM's own layer of experts, as the model's code builds it
    loading.py    vLLM's model, given the checkpoint's tensors without memory for either
    hf_config.py  the config as vLLM reads it; quant_config.py the quantization_config
    attention.py  whether attention has heads of the model's size
    trace.py      what each kernel said when it was asked
    experts_trace.py  the same for classes of experts
"""

from maca_serve.doctor.diagnosis import diagnose, diagnose_cards, read_folder, read_shapes

__all__ = ["diagnose", "diagnose_cards", "read_folder", "read_shapes"]
