import pytest
from maca_serve.doctor import findings, speeds
from maca_serve.doctor.checks import Contents
from maca_serve.machine import describe_machine

CONFIG = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}
HERE = describe_machine()
SLOW = {
    "kernel": "CPUWNA16LinearKernel",
    "machine": "2 cores of X",
    "like": speeds.kind(HERE),
    "model": "8B-shaped",
    "load": "32 in, 32 out, 1 in flight",
    "ratio": 0.83,
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


def test_a_slow_kernel_is_named_with_its_source(measured):
    measured()
    (note,) = notes()
    assert "was slower than BF16, 0.83x" in note and "some.json" in note
    measured(ratio=1.0)
    (note,) = notes()
    assert "was no faster than BF16, 1.00x" in note


@pytest.mark.parametrize(
    "changes", [{"ratio": 1.06}, {"ratio": 2.0}, {"like": ["neon"]}, {"kernel": "Marlin"}]
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
        assert 0 < found["ratio"] < 100


def test_cards_count_before_the_cpu():
    machine = {"gpus": ["H100"], "cpu_flags": ["avx2"]}
    assert speeds.kind(machine) == ["H100"]
    assert speeds.kind({**machine, "gpus": []}) == ["avx2"]
