import pytest
from maca_serve.common.machine import describe_machine
from maca_serve.doctor import findings, speeds
from maca_serve.doctor.checks import Contents

CONFIG = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}
HERE = describe_machine()
SLOW = {
    "kernel": "CPUWNA16LinearKernel",
    "machine": "2 cores of X",
    "like": speeds.kind(HERE),
    "model": "8B-shaped",
    "tokens": "32 in, 32",
    "ratios": {"1 in flight": 0.83, "4 in flight": 0.6},
    "source": "some.json",
}


@pytest.fixture
def measured(monkeypatch):
    """What is taken for measured."""

    def give(**changes):
        monkeypatch.setattr(speeds, "read_speeds", lambda: [{**SLOW, **changes}])

    return give


def notes(simulated=False):
    name = "model.layers.0.o_proj"
    layer = dict.fromkeys(("class", "experts", "scheme", "error", "with_packages", "roomy_kernel"))
    layer |= {"layer": name, "parts": [name], "quantized": True, "kernel": "CPUWNA16LinearKernel"}
    layer |= {"shape": [64, 64], "partition": [64, 64], "refusals": [], "missing_ops": []}
    target = {"capability": None, "simulated": simulated, "tensor_parallel": 1}
    told = {"vllm": "0", "target": target, "refused": None, "unasked": None, "layers": [layer]}
    contents = Contents({name: (64, 64)}, {name}, [])
    found = findings.describe("x", "W4A16", CONFIG, contents, told)["problems"]
    return [problem["what"] for problem in found if " than BF16" in problem["what"]]


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ({}, "slower than BF16 where it was measured: 0.83x with 1 in flight, 0.60x with 4 in f"),
        ({}, "(output tokens per second of 8B-shaped, 32 in, 32 out, on 2 cores of X: some.json"),
        ({"a": 1.0}, "was no faster than BF16 where it was measured: 1.00x with a ("),
        ({"a": 1.9, "b": 1.3, "c": 1.0}, "was not always faster than BF16 where it was measured: "),
        ({"a": 1.9, "b": 1.3, "c": 1.0}, "1.90x with a, 1.00x with c ("),
        ({"a": 1.0, "b": 0.6}, "was no faster than BF16"),
    ],
)
def test_a_slow_kernel_is_named_with_its_loads_and_source(measured, ratios, says):
    measured(**({"ratios": ratios} if ratios else {}))
    (note,) = notes()
    assert says in note


@pytest.mark.parametrize(
    "changes", [{"ratios": {"a": 1.06, "b": 2.0}}, {"like": ["neon"]}, {"kernel": "Marlin"}]
)
def test_other_machines_kernels_and_what_is_faster_are_not(measured, changes):
    measured(**changes)
    assert notes() == []


def test_a_simulated_card_is_not_this_machine(measured):
    measured()
    assert notes(simulated=True) == []


def test_what_is_shipped_can_be_read():
    for found in speeds.read_speeds():
        assert set(found) == set(SLOW)
        assert all(0 < ratio < 100 for ratio in found["ratios"].values())


def test_cards_count_before_the_cpu():
    machine = {"gpus": ["H100"], "cpu_flags": ["avx2"]}
    assert speeds.kind(machine) == ["H100"]
    assert speeds.kind({**machine, "gpus": []}) == ["avx2"]
