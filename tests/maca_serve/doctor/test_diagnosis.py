import json
import sys

import pytest
import torch
from maca_serve.common.errors import EngineError, UserError
from maca_serve.doctor import asking, diagnosis
from packed import write_int8
from safetensors.torch import load_file, save_file

MODEL = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}


@pytest.fixture
def asked(monkeypatch):
    """The question that vLLM would be asked."""
    questions = []

    def ask(question):
        questions.append(question)
        target = {"simulated": True, "tensor_parallel": question["tensor_parallel"]}
        answer = {"vllm": "0", "target": target, "unasked": None, "refused": None}
        return {"answers": [answer for _ in question["capabilities"]]}

    monkeypatch.setattr(diagnosis, "ask", ask)
    return questions


def diagnose_shapes(path, gpu=None, tensor_parallel=1):
    subject = diagnosis.read_shapes(path)
    (found,) = diagnosis.diagnose_cards(subject, [gpu], tensor_parallel=tensor_parallel)
    return found


def write(tmp_path, value):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("80", 80),
        ("9.0", 90),
        ("sm90", 90),
        ("SM_90a", 90),
        ("12.0", 120),
        ("120", 120),
        ("60", 60),
        ("121", 121),
        ("h100", 90),
        ("A100", 80),
        ("NVIDIA L40S", 89),
        ("RTX 4090", 89),
        ("rtx-pro-6000", 120),
        ("GeForce RTX 5090", 120),
        ("b200", 100),
    ],
)
def test_capabilities(text, number):
    assert diagnosis.parse_capability(text) == number


@pytest.mark.parametrize(
    "text", ["9", "h1000", "", "rtx", "9.0.1", "1200", "-80", "999", "130", "4.0"]
)
def test_capabilities_that_are_none(text):
    with pytest.raises(UserError, match=r"--gpu: .* is no card .* no compute capability; give"):
        diagnosis.parse_capability(text)


def test_question_about_shapes(tmp_path, asked):
    config = {**MODEL, "quantization_config": {**GPTQ, "modules_to_not_convert": ["head"]}}
    layers = {"model.up_proj": [128, 64], "lm_head": [100, 64]}
    path = write(tmp_path, {"config": config, "layers": layers})
    found = diagnose_shapes(path, gpu="9.0", tensor_parallel=2)
    (question,) = asked
    assert question["sizes"] == {"model.up_proj": (128, 64), "lm_head": (100, 64)}
    assert question["quantized"] == ["model.up_proj"]
    assert (question["capabilities"], question["tensor_parallel"]) == ([90], 2)
    assert found["verdict"] == "unknown", "no layer was answered for"
    json.dumps(found)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "wants"),
        ({"config": {}}, "wants"),
        ({"config": {}, "layers": {"a": [1]}}, r"a is \[1\], not \[output features"),
        ({"config": {}, "layers": {"a": [1, 0]}}, r"a is \[1, 0\]"),
        ({"config": MODEL, "layers": {"a": [1, 1]}}, "not quantized"),
        (
            {"config": {**MODEL, "quantization_config": {"bits": 4}}, "layers": {"a": [1, 1]}},
            "names no quant_method",
        ),
        ({"config": {"quantization_config": GPTQ}, "layers": {"a": [1, 1]}}, "no architectures"),
    ],
)
def test_shape_files_that_are_none(tmp_path, asked, value, says):
    with pytest.raises(UserError, match=says):
        diagnose_shapes(write(tmp_path, value))
    assert asked == []


def test_a_file_of_shapes_that_is_not_there(tmp_path, asked):
    with pytest.raises(UserError, match=r"--shapes: .*x\.json: no such file$"):
        diagnose_shapes(tmp_path / "x.json")


def test_unquantized_folder(base):
    with pytest.raises(UserError, match="base: not quantized"):
        diagnosis.diagnose(base)


def test_folder_with_weights_that_are_none(quantized):
    (quantized / "model.safetensors").write_bytes(b"0" * 1000)
    with pytest.raises(UserError, match="not a safetensors file"):
        diagnosis.diagnose(quantized)


def test_cards_are_asked_about_in_one_question(tmp_path, asked):
    config = {**MODEL, "quantization_config": GPTQ}
    path = write(tmp_path, {"config": config, "layers": {"a": [64, 64]}})
    found = diagnosis.diagnose_cards(diagnosis.read_shapes(path), ["80", None, "sm120"])
    assert len(found) == 3 and [q["capabilities"] for q in asked] == [[80, None, 120]]


def test_ranks(tmp_path, asked):
    config = {**MODEL, "quantization_config": GPTQ}
    path = write(tmp_path, {"config": config, "layers": {"a": [64, 64]}})
    with pytest.raises(UserError, match="--tp: 0 is not positive"):
        diagnose_shapes(path, tensor_parallel=0)


def test_a_worker_that_dies_is_reported_with_its_cause(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no CUDA here' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(asking, "require_vllm", lambda: "0")
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(EngineError, match="could not be asked: ImportError: no CUDA here"):
        asking.ask({})


def test_values_of_scales_are_read(tmp_path):
    write_int8(tmp_path / "w8")
    file = tmp_path / "w8" / "model.safetensors"
    tensors = load_file(file)
    scale, other = (f"model.layers.0.mlp.{part}_proj.weight_scale" for part in ("up", "down"))
    tensors[scale][3] = float("inf")
    tensors[other][3] *= -1
    tensors["model.norm.weight"][0] = float("nan")
    of_keys = "model.layers.0.self_attn.k_scale"
    tensors[of_keys] = -torch.ones(1)
    save_file(tensors, file, metadata={"format": "pt"})
    contents = diagnosis.read_folder(tmp_path / "w8").contents
    problem, of_cache = contents.problems
    assert problem.what == "holds NaN or infinity"
    assert sorted(problem.modules) == [scale, "model.norm.weight"]
    assert "is not above zero" in of_cache.what and of_cache.modules == [of_keys]
    assert contents.signed == {"model.layers.0.mlp.down_proj"}


def test_a_plan_has_tensors_for_vllm_to_load(tmp_path, asked):
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"a": group},
    }
    layers = {"model.up_proj": [128, 64], "lm_head": [100, 64]}
    config = {**MODEL, "quantization_config": quantization}
    diagnose_shapes(write(tmp_path, {"config": config, "layers": layers}))
    assert asked[0]["tensors"] == {
        "model.up_proj.weight": ("I8", [128, 64]),
        "model.up_proj.weight_scale": ("BF16", [128, 1]),
        "lm_head.weight": ("BF16", [100, 64]),
    }
    assert asked[0]["whole"] is False
