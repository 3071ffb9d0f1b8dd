from maca_serve.doctor import view
from rich.console import Console

LAYER = {
    "layer": "model.layers.*.mlp.down_proj",
    "count": 30,
    "experts": None,
    "quantized": True,
    "shape": [576, 1536],
    "partition": [576, 768],
    "kernel": None,
    "with_packages": {"kernel": "HummingLinearKernel", "needs": ["humming"]},
    "refused": [{"kernel": "MarlinLinearKernel", "reason": "3 bits", "needs": []}],
}
DIAGNOSIS = {
    "subject": "dir",
    "scheme": "W3A16",
    "vllm": "0.32.0",
    "target": {"name": "a card", "tensor_parallel": 2, "dtype": "bfloat16"},
    "verdict": "conditional",
    "problems": [
        {"severity": "error", "what": "w", "cure": "c", "count": 2, "modules": ["a", "b"]}
    ],
    "layers": [LAYER],
    "changes": [{"change": "store it wider", "kernels": ["CPUWNA16LinearKernel"]}],
}


def test_what_stands_above():
    said = list(view.lines(DIAGNOSIS))
    assert said[0] == "dir: W3A16"
    assert said[1] == "target: a card, 2 ranks, bfloat16 (vLLM 0.32.0)"
    assert "with the packages named below" in said[2]


def test_table():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(view.layer_table(DIAGNOSIS))
    text = console.export_text()
    assert "layers.*.mlp.down_proj" in text
    assert "576 x 1536 -> 576 x 768" in text
    assert "none; with humming-kernels: Humming" in text


def test_what_stands_below():
    assert list(view.endings(DIAGNOSIS)) == [
        "passed over:",
        "    Marlin: 3 bits",
        "ERROR: w (a and 1 more)",
        "    -> c",
        "what would help, as vLLM answers:",
        "    store it wider: CPUWNA16",
    ]


def test_reasons_of_some_layers_name_them():
    other = {**LAYER, "layer": "model.layers.*.mlp.up_proj", "refused": []}
    said = list(view.endings({**DIAGNOSIS, "layers": [LAYER, other]}))
    assert said[1] == "    Marlin: 3 bits (down_proj)"


def test_table_of_experts():
    experts = {**LAYER, "experts": 128, "kernel": "MarlinExperts", "with_packages": None}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(view.layer_table({**DIAGNOSIS, "layers": [experts]}))
    text = console.export_text()
    assert "128 experts of 576 x 1536 -> 576 x 768" in text
    assert "MarlinExperts" in text
