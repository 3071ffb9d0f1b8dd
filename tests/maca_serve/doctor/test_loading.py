"""Tensors that vLLM's real loader refuses, lacks or reads in part; without memory for any."""

import json
import subprocess
import sys

import packed
import pytest
from maca_serve.common.errors import UserError
from maca_serve.doctor import asking, loadable
from maca_serve.doctor.checks import planned_tensors
from maca_serve.doctor.headers import read_headers
from maca_serve.formats.checkpoint import open_checkpoint

pytest.importorskip("vllm.model_executor.kernels.linear")

L = "model.layers.1."
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
BIAS = "model.layers.0.self_attn.q_proj.bias"
QWEN2 = {
    **SHAPE,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LFM2 = {
    **SHAPE,
    "model_type": "lfm2_moe",
    "architectures": ["Lfm2MoeForCausalLM"],
    "num_dense_layers": 0,
    "layer_types": ["full_attention", "full_attention"],
}
QWEN3_NEXT = {
    **SHAPE,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
LLAMA4 = {
    **SHAPE,
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    "intermediate_size_mlp": 256,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 1,
}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def read(folder):
    """What a checkpoint's files say, to be changed and asked about."""
    config = json.loads((folder / "config.json").read_text())
    return {"config": config, "tensors": loadable.describe_tensors(read_headers(folder))}


def without(one, *parts):
    left = {n: t for n, t in one["tensors"].items() if not any(part in n for part in parts)}
    assert len(left) < len(one["tensors"])
    return one | {"tensors": left}


def with_tensor(one, name, *tensor):
    assert name in one["tensors"]
    return one | {"tensors": one["tensors"] | {name: tensor}}


def of_experts(config, quantized, names=("gate_proj", "up_proj", "down_proj"), block="mlp"):
    """Linears of a model of experts, packed or not, and nothing else."""
    sizes = {}
    for layer in range(2):
        for expert in range(4):
            gate, up, down = (
                f"model.layers.{layer}.{block}.experts.{expert}.{name}" for name in names
            )
            sizes |= {gate: (64, 128), up: (64, 128), down: (128, 64)}
    scheme = packed.quantization(packed.weights_config(4, group=32))
    tensors = planned_tensors(sizes | quantized, scheme)
    return {"config": {**config, "quantization_config": scheme}, "tensors": tensors}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What one worker said of each."""
    folder = tmp_path_factory.mktemp("whole")
    packed.write_int8(folder / "w8")
    packed.write_packed(folder / "w3", 3)
    whole = read(folder / "w8")
    v_scale = f"{L}self_attn.v_proj.weight_scale"
    cached = json.loads(json.dumps(whole))
    cached["config"]["quantization_config"]["kv_cache_scheme"] = CACHE
    gates = {f"model.layers.{i}.mlp.shared_expert_gate": (1, 128) for i in range(2)}
    experts = of_experts(QWEN2, {})
    lfm2 = of_experts(LFM2, {}, ("w1", "w3", "w2"), "feed_forward")
    items = {
        "whole": whole,
        "packed": read(folder / "w3"),
        "no layer": without(whole, L),
        "no scale of one part": without(whole, v_scale),
        "no norm": without(whole, "model.norm"),
        "no embeddings": without(whole, "embed_tokens"),
        "scale by tensor": with_tensor(whole, v_scale, "BF16", [1]),
        "other rows": with_tensor(whole, f"{L}mlp.down_proj.weight", "I8", [96, 104]),
        "fewer layers": whole | {"config": whole["config"] | {"num_hidden_layers": 1}},
        "a bias": whole | {"tensors": whole["tensors"] | {BIAS: ("BF16", [128])}},
        "rows too many": with_tensor(whole, f"{L}mlp.gate_proj.weight_scale", "BF16", [208, 1]),
        "no scales of a cache": cached,
        "gates": of_experts(QWEN2, gates),
        "experts": experts,
        "no expert": without(experts, f"{L}mlp.experts.2.up_proj."),
        "names": lfm2,
        "other names": of_experts(LFM2, {}, block="feed_forward"),
        "made on a device": {
            "config": QWEN3_NEXT,
            "tensors": {
                "model.layers.0.linear_attn.A_log": ("F32", [4]),
                "model.layers.0.linear_attn.dt_bias": ("BF16", [4]),
            },
        },
        "read twice": {"config": LLAMA4, "tensors": {"model.norm.weight": ("BF16", [128])}},
        "unknown": {"config": {**QWEN2, "architectures": ["NoSuchModel"]}, "tensors": {}},
    }
    done = subprocess.run(
        [sys.executable, "-m", "maca_serve.doctor.worker"],
        input=json.dumps({"load": list(items.values())}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(items, json.loads(done.stdout)["loaded"], strict=True))


@pytest.mark.parametrize("name", ["whole", "packed"])
def test_what_is_whole_loads(loaded, name):
    fine = {"unasked": None, "attention": None}
    fine |= {"refused": [], "missing": [], "unread": [], "cut": []}
    assert loaded[name] == fine


def test_missing_tensors_are_named_as_the_checkpoint_would(loaded):
    gone = loaded["no layer"]["missing"]
    assert len(gone) == 2 + 2 * 7 and f"{L}self_attn.v_proj.weight_scale" in gone
    assert all(name.startswith(L) for name in gone)
    one = loaded["no scale of one part"]["missing"]
    assert one == [f"{L}self_attn.v_proj.weight_scale"]
    assert loaded["no norm"]["missing"] == ["model.norm.weight"]
    assert loaded["no embeddings"]["missing"] == ["model.embed_tokens.weight"]
    scales = [f"model.layers.{i}.self_attn.{part}_scale" for i in range(2) for part in "kv"]
    assert loaded["no scales of a cache"]["missing"] == scales


def test_shapes_that_the_loader_refuses(loaded):
    (refused,) = loaded["scale by tensor"]["refused"]
    scales = [f"model.layers.{i}.self_attn.v_proj.weight_scale" for i in (1, 0)]
    assert refused["tensors"] == scales and "exceeds dimension" in refused["reason"]
    assert loaded["scale by tensor"]["missing"] == []
    (refused,) = loaded["other rows"]["refused"]
    assert refused["tensors"][0] == f"{L}mlp.down_proj.weight"


def test_rows_that_the_loader_would_leave_out(loaded):
    (cut,) = loaded["rows too many"]["cut"]
    assert cut == {"tensor": f"{L}mlp.gate_proj.weight_scale", "shape": [208, 1], "read": 104}


def test_layers_that_the_configuration_does_not_have(loaded):
    problems = list(loadable.loading_problems(loaded["fewer layers"]))
    assert {problem.what for problem in problems} == {"the model of config.json has no layers.*"}
    assert all(problem.modules[0].startswith(L) for problem in problems)
    assert "take the config.json that came" in problems[0].cure


def test_tensors_that_the_loader_leaves_out(loaded):
    """A bias where the config.json says that there is none."""
    assert loaded["a bias"]["unread"] == [BIAS]
    left_out = {"unread": [BIAS, "lm_head.weight", "mtp.fc.weight", "a.inv_freq", "a.k_scale"]}
    (problem,) = loadable.loading_problems(loaded["whole"] | left_out)
    assert problem.severity == "warning" and problem.modules == [BIAS]


def test_names_of_experts(loaded):
    assert not loaded["experts"]["refused"] and not loaded["names"]["refused"]
    of_them = [name for name in loaded["experts"]["missing"] if ".experts." in name]
    assert of_them == []
    lacking = [name for name in loaded["no expert"]["missing"] if ".experts." in name]
    parts = ("weight_packed", "weight_scale")
    assert lacking == [f"{L}mlp.experts.2.up_proj.{part}" for part in parts]
    other = loaded["other names"]
    assert other["refused"] or any(".experts." in name for name in other["missing"])


def test_a_gate_that_vllm_does_not_quantize(loaded):
    gates = {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
    problems = list(loadable.loading_problems(loaded["gates"], gates))
    first = problems[0]
    assert "without quantization" in first.what and "`ignore`" in first.cure
    assert set(first.modules) == gates
    needed = [name for problem in problems for name in problem.modules if "lack it" in problem.what]
    assert not [name for name in needed if "shared_expert_gate" in name]


def test_parameters_that_a_model_makes_on_a_device_of_its_own(loaded):
    found = loaded["made on a device"]
    assert found["unasked"] is None and not found["refused"]
    assert not [name for name in found["missing"] if "A_log" in name or "dt_bias" in name]


def test_a_folder_that_a_model_reads_while_it_is_built_is_there(loaded):
    found = loaded["read twice"]
    assert found["unasked"] is None and "model.norm.weight" not in found["missing"]


def test_a_model_that_cannot_be_built_is_not_passed(loaded):
    assert "NoSuchModel" in loaded["unknown"]["unasked"]


def test_a_run_does_not_begin_with_a_damaged_checkpoint(tmp_path, loaded, monkeypatch, capsys):
    packed.write_int8(tmp_path / "w8")
    checkpoint = open_checkpoint(tmp_path / "w8")
    answers = [loaded["whole"], loaded["no layer"]]
    monkeypatch.setattr(loadable, "ask", lambda question: {"loaded": answers})
    with pytest.raises(UserError) as refused:
        loadable.require_loadable([checkpoint, checkpoint])
    assert f"{L}input_layernorm.weight and 15 more: the model needs it" in str(refused.value)
    answers[1] = loaded["unknown"]
    loadable.require_loadable([checkpoint, checkpoint])
    assert "not tried on vLLM's loader" in capsys.readouterr().err


def test_the_worker_is_asked(tmp_path):
    packed.write_int8(tmp_path / "w8")
    assert asking.ask({"load": [read(tmp_path / "w8")]})["loaded"][0]["missing"] == []
