"""Devices by name, and that all of a run is on the one that was given."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from checkpoints import load, quantize
from pretend_device import NAME, Elsewhere
from safetensors.torch import load_file
from tiny import WIDE, random_sequences, random_text

import maca_llmc
from maca_llmc.calibrate import hidden_states
from maca_llmc.common import device
from maca_llmc.common.device import compute_on, fast_linears, resolve_device
from maca_llmc.common.errors import UserError
from maca_llmc.run import prepare

ROOT = Path(__file__).parents[3]


def devices(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_a_name_is_resolved(monkeypatch, name, count, expected):
    devices(monkeypatch, count)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, count):
    devices(monkeypatch, count)
    match = rf"device '{name}' is not there \({count} CUDA devices\): give --device cpu"
    with pytest.raises(UserError, match=match):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cpu:1", "auto:0", "cuda:one", "cuda:-1", "CUDA"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UserError, match=rf"device '{name}': give auto, cpu, cuda or cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_linears_are_rounded_once_where_the_cpu_has_no_units_for_them(monkeypatch, bias):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    module = torch.nn.Linear(96, 40, bias=bias).bfloat16()
    rows = torch.randn(64, 96, generator=torch.manual_seed(0)).bfloat16()
    with torch.no_grad(), fast_linears(torch.device("cpu")):
        found = module(rows)
    exact = rows.double() @ module.weight.double().T + (module.bias.double() if bias else 0)
    assert found.dtype == torch.bfloat16
    differ = found != exact.bfloat16()
    assert differ.float().mean() < 0.01  # ties of float32's own rounding
    steps = found.double().abs()[differ] * torch.finfo(torch.bfloat16).eps
    assert ((found.double() - exact).abs()[differ] <= steps).all()


@pytest.mark.parametrize(("capability", "used"), [("AVX2", True), ("AVX512", False)])
def test_only_slow_products_are_replaced(monkeypatch, capability, used):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    calls = []
    monkeypatch.setattr(device, "_rounded_linear", lambda *args: calls.append(args) or args[0])
    with torch.no_grad(), fast_linears(torch.device("cpu")):
        torch.nn.Linear(4, 4).bfloat16()(torch.ones(1, 4, dtype=torch.bfloat16))
    assert bool(calls) is used


def test_calibrating_and_evaluating_use_them(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    rounded, calls = device._rounded_linear, []
    monkeypatch.setattr(
        device, "_rounded_linear", lambda *args: calls.append(args[1].shape) or rounded(*args)
    )
    model, used = tiny_models("llama"), {}
    made = quantize(model, tmp_path / "made")
    used["calibrating"], calls[:] = set(calls), []
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(random_text()))
    maca_llmc.evaluate(model, [made], text=text, lengths=[8, 32], windows=2, targets=4)
    used["evaluating"] = set(calls)
    assert all(len(shapes) > 2 for shapes in used.values()), used


def test_float32_linears_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    module, rows = torch.nn.Linear(96, 40), torch.randn(64, 96)
    with torch.no_grad():
        expected = module(rows)
        with fast_linears(torch.device("cpu")):
            assert torch.equal(module(rows), expected)


def test_a_cuda_device_becomes_the_current_one_and_computes_float32_as_such(monkeypatch):
    chosen, products = mock.Mock(), torch.backends.cuda.matmul
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        compute_on(torch.device("cpu"))
        assert not chosen.called and products.fp32_precision == "tf32"
        compute_on(torch.device("cuda", 1))
        chosen.assert_called_once_with(torch.device("cuda", 1))
        assert products.fp32_precision == "ieee" and products.allow_tf32 is False
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize(("free", "place"), [(4000, "cuda:1"), (3999, "cpu")])
def test_hidden_states_wait_on_a_gpu_while_they_leave_it_room(monkeypatch, free, place):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    gpu = torch.device("cuda", 1)
    assert hidden_states.waiting_place(gpu, 1000) == torch.device(place)
    assert hidden_states.waiting_place(torch.device("cpu"), 1) == torch.device("cpu")


W4 = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "weight"},
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
SMOOTHED = {"SmoothQuantModifier": {"smoothing_strength": 0.5}}
RUNS = {
    "default": ("llama", {}, W4),
    "routed experts": ("qwen3_moe", {}, W4),
    "other norms": ("gemma3_text", {}, {"scheme": "W8A8", "ignore": ["lm_head"]}),
    "nested GPTAQ": ("qwen3", {}, {**W4, "nested_scales": [8, 16], "gptaq_alpha": 0.25}),
    "smoothed": ("llama", SMOOTHED, {"scheme": "W8A8", "ignore": ["lm_head"]}),
    "stock's pipeline and scales": (
        "llama",
        {},
        {"scheme": "W8A16", "hessian_scales": False, "ignore": ["lm_head"]},
    ),
}


@pytest.fixture(scope="module")
def elsewhere():
    """Runs a function on a device that is not the CPU."""
    pretended = Elsewhere()
    yield pretended
    pretended.close()


def logits(checkpoint):
    ids = random_sequences([24])[0]
    with torch.no_grad():
        return load(checkpoint, dequantize=True)(input_ids=ids[None]).logits


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stays_on_its_device(tiny_models, tmp_path, elsewhere, name):
    family, before, fields = RUNS[name]
    model = tiny_models(family, **WIDE)
    stage = {"quantize_stage": {"quantize_modifiers": {**before, "MaCaModifier": fields}}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(stage, sort_keys=False))
    enough = {"tokens": 1024}  # for Hessians in which the last bit of an input changes little
    here = quantize(model, tmp_path / "here", recipe, **enough)
    _, ran = elsewhere(quantize, model, tmp_path / "there", recipe, **enough)
    layers, linears = 2, {"qwen3_moe": 4}.get(family, 7)
    assert ran["aten::cholesky_inverse"] >= layers * 4, "the solve was not there"
    assert ran["aten::addmm_"] >= layers * linears, "Hessians were not there"
    expected = logits(here)
    apart, lost = (torch.linalg.norm(logits(x) - expected) for x in (tmp_path / "there", model))
    assert apart < lost, "further from the run on the CPU than what both were made from"


def quantize_keeping_hidden_states_there(*args, **settings):
    place = mock.Mock(return_value=torch.device(NAME, 0))
    with mock.patch.object(prepare, "waiting_place", place):
        return quantize(*args, **settings)


def test_hidden_states_wait_on_a_device_that_has_room(tiny_models, tmp_path, elsewhere):
    model, recipe = tiny_models("llama", **WIDE), ROOT / "recipes" / "w8a8.maca.yaml"
    _, on_host = elsewhere(quantize, model, tmp_path / "one", recipe)
    _, on_device = elsewhere(quantize_keeping_hidden_states_there, model, tmp_path / "two", recipe)
    assert on_device["aten::_to_copy"] < on_host["aten::_to_copy"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_evaluating_stays_on_its_device(tiny_models, tmp_path, elsewhere):
    model = tiny_models("llama", **WIDE)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(random_text()))
    settings = {"text": text, "lengths": [8, 32], "windows": 2, "targets": 4}
    quantized = quantize(model, tmp_path / "quantized", ROOT / "recipes" / "w8a8.maca.yaml")
    here = maca_llmc.evaluate(model, [quantized], **settings)
    _, base_alone = elsewhere(maca_llmc.evaluate, model, [], **settings)
    there, ran = elsewhere(maca_llmc.evaluate, model, [quantized], **settings)
    assert ran["aten::embedding"] == 2 * base_alone["aten::embedding"] > 0
    assert ran["aten::mm"] == 2 * base_alone["aten::mm"] > 0
    for found, own in zip(there["checkpoints"], here["checkpoints"], strict=True):
        for length in ("8", "32"):
            expected = pytest.approx(own["perplexity"][length]["ppl"], rel=5e-3)
            assert found["perplexity"][length]["ppl"] == expected
