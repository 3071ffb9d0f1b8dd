"""Layers of experts: gathered, read off a model's code, and asked about of the real vLLM.

As in test_doctor_selection.py, one process answers each question, so there are few.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.model_executor.kernels.linear")

from maca_serve.doctor.experts import Experts, gather, read_call
from maca_serve.doctor.fusing import adopt_fusions, fuse, model_class

P = "model.layers.{}.mlp.experts.{}.{}_proj"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 128,
}
ATTENTION = {
    "model.layers.0.self_attn.q_proj": [512, 512],
    "model.layers.0.self_attn.k_proj": [256, 512],
    "model.layers.0.self_attn.v_proj": [256, 512],
}


def experts(layers=3, count=4, between=256, hidden=512):
    sizes = {"gate": [between, hidden], "up": [between, hidden], "down": [hidden, between]}
    return {
        P.format(layer, number, part): size
        for layer in range(layers)
        for number in range(count)
        for part, size in sizes.items()
    }


def compressed(form, weights, inputs=None, ignore=()):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignore],
        "config_groups": {"group_0": {**group, "format": form}},
    }


def integers(bits, group, symmetric=True):
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    return compressed("pack-quantized", weights | strategy)


CHANNEL = {"num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
TENSOR = CHANNEL | {"type": "float", "strategy": "tensor"}
CHANGES = {
    "w4, group 32": integers(4, 32),
    "w4, channel": integers(4, None),
    "w4, asymmetric": integers(4, 64, symmetric=False),
    "w3": integers(3, 64),
    "w8a8": compressed("int-quantized", CHANNEL, TOKEN),
    "fp8, static": compressed("float-quantized", TENSOR, TENSOR),
}


def ask(capability=None, ranks=1, config=CONFIG, sizes=None, quantization=None, changes=CHANGES):
    sizes = sizes or ATTENTION | experts()
    variants = [
        {"change": name, "quantization_config": q, "tensor_parallel": ranks, "dtype": None}
        for name, q in changes.items()
    ]
    question = {
        "config": {**config, "quantization_config": quantization or integers(4, 64)},
        "sizes": sizes,
        "quantized": sorted(sizes),
        "capabilities": [capability],
        "tensor_parallel": ranks,
        "variants": variants,
    }
    done = subprocess.run(
        [sys.executable, "-m", "maca_serve.doctor.worker"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (answer,) = json.loads(done.stdout)["answers"]
    return answer


def of_experts(answer):
    return [entry for entry in answer["layers"] if entry["experts"]]


def changed(answer, change):
    (found,) = [entry for entry in answer["variants"] if entry["change"] == change]
    (entry,) = of_experts(found)
    return entry


def reasons(entry):
    return {refusal["kernel"]: refusal["reason"] for refusal in entry["refusals"]}


@pytest.fixture(scope="module")
def here():
    answer = ask()
    if answer["target"]["capability"] is not None:
        pytest.skip("for a machine without a CUDA device")
    return answer


@pytest.fixture(scope="module")
def amx():
    import torch

    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's experts of few bits want AMX")


@pytest.fixture(scope="module")
def hopper():
    return ask(90, 2)


@pytest.fixture(scope="module")
def wrong():
    """Heads of 60, and a config that speaks of more experts than there are."""
    return ask(config=CONFIG | {"head_dim": 60, "num_experts": 8}, changes={})


def test_every_layer_is_counted(here):
    names = [entry["layer"] for entry in of_experts(here)]
    assert names == [f"model.layers.{n}.mlp.experts" for n in range(3)]
    for layer, entry in enumerate(of_experts(here)):
        assert entry["experts"] == 4 and len(entry["parts"]) == 12
        assert set(entry["parts"]) == {part for part in experts() if f"layers.{layer}." in part}
        assert entry["class"] == "RoutedExperts"
        assert entry["outs"] == [256, 256]
        assert entry["shape"] == entry["partition"] == [512, 512]
        assert entry["down"] == {"outs": [512], "shape": [512, 256], "partition": [512, 256]}
    assert here["unasked_experts"] == []


def test_cpu_chooses_and_says_why_not_the_others(here, amx):
    for entry in of_experts(here):
        assert entry["scheme"] == "CompressedTensorsWNA16MoEMethod"
        assert (entry["kernel"], entry["backend"]) == ("CPUExpertsInt4", "CPU")
        assert entry["missing_ops"] == []
        assert list(reasons(entry)) == ["ZentorchExpertsInt4"]


def test_cpu_has_int8(here, amx):
    assert changed(here, "w8a8")["kernel"] == "CPUExpertsInt8"


@pytest.mark.parametrize("change", ["w4, group 32", "w4, asymmetric"])
def test_cpu_refuses_a_scheme(here, amx, change):
    entry = changed(here, change)
    assert entry["kernel"] is None
    assert entry["error"].startswith("NotImplementedError: No WNA16 MoE backend")
    assert "does not support quantization scheme" in reasons(entry)["CPUExpertsInt4"]


def test_what_vllm_asserts_is_the_error(here, amx):
    """It chooses its class and then stumbles."""
    entry = changed(here, "w4, channel")
    assert entry["kernel"] is None
    assert entry["error"] == 'AssertionError: assert weight_quant.strategy == "group"'


def test_ranks_share_experts(hopper):
    for entry in of_experts(hopper):
        assert entry["partition"] == [256, 512] and entry["outs"] == [128, 128]
        assert entry["down"]["partition"] == [512, 128]


def test_hopper_takes_humming(hopper):
    """Which comes with the CUDA build that is not the one here."""
    for entry in of_experts(hopper):
        assert entry["kernel"] == entry["roomy_kernel"] == "HummingIndexedExperts"
    assert changed(hopper, "w3")["kernel"] == "HummingIndexedExperts"
    asymmetric = changed(hopper, "w4, asymmetric")
    assert asymmetric["kernel"] == "MarlinExperts"
    refused = reasons(asymmetric)["TrtLlmMxint4ExpertsMonolithic"]
    assert refused == "zero points and bias are not supported"


def test_a_missing_package_may_bring_a_better_class(hopper):
    entry = changed(hopper, "fp8, static")
    assert entry["kernel"] == "TritonOrCutlassExperts"
    assert entry["with_packages"] == {
        "kernel": "FlashInferExperts",
        "needs": ["flashinfer"],
        "install": ["flashinfer-cubin"],
    }
    needs = {refusal["kernel"]: refusal["needs"] for refusal in entry["refusals"]}
    assert needs["FlashInferExperts"] == ["flashinfer"]
    assert needs["TritonOrDeepGemmExperts"] == []


def test_attention_has_heads_of_64_and_not_of_60(here, wrong, hopper):
    assert here["attention"]["refused"] is None
    assert here["attention"]["head_size"] == 64
    assert wrong["attention"]["refused"] == "head_size not supported"
    assert wrong["attention"]["head_size"] == 60
    assert 64 in wrong["attention"]["sizes"] and 60 not in wrong["attention"]["sizes"]
    assert hopper["attention"] is None, "nobody was asked on behalf of another card"


def test_experts_that_disagree_with_the_config_are_not_asked_about(wrong):
    assert of_experts(wrong) == []
    (unasked,) = wrong["unasked_experts"]
    assert sorted(unasked["modules"]) == sorted(experts())
    assert "say 8 experts of down_proj 512 x 256" in unasked["reason"]
    assert "the checkpoint has 4 of" in unasked["reason"]


def test_dense_layers_among_experts_are_fused(monkeypatch):
    """Which the constructor of vLLM's Qwen3-MoE decides; one without them keeps its mapping."""
    model = model_class(["Qwen3MoeForCausalLM"])
    monkeypatch.setattr(model, "packed_modules_mapping", dict(model.packed_modules_mapping))
    adopt_fusions(model, ATTENTION)
    assert "gate_up_proj" not in model.packed_modules_mapping
    dense = {"model.layers.1.mlp.gate_proj": (1024, 512), "model.layers.1.mlp.up_proj": (1024, 512)}
    adopt_fusions(model, ATTENTION | dense)
    (fused,) = fuse(model, dense)
    assert (fused.name, fused.kind) == (
        "model.layers.1.mlp.gate_up_proj",
        "MergedColumnParallelLinear",
    )
    assert (fused.parts, fused.outs) == (tuple(dense), (1024, 1024))


# What follows reads a model's code: this file's, whose factory builds nothing.

Model = type("Model", (), {"__module__": __name__})
SIZES = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}


def FusedMoEFactory(  # noqa: N802  (vLLM's name)
    num_experts,
    hidden_size,
    intermediate_size,
    prefix="",
    ckpt_names=("gate_proj", "down_proj", "up_proj"),
    top_k=1,
):
    raise AssertionError("the call is only to be read")


class Block:
    def __init__(self, config, quant_config=None, prefix=""):
        self.experts = FusedMoEFactory(
            num_experts=2,
            hidden_size=config.hidden_size,
            intermediate_size=8,
            prefix=f"{prefix}.experts",
        )


def engine():
    text = SimpleNamespace(hidden_size=16)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text), parallel_config=SimpleNamespace()
    )


def test_the_models_call_is_read():
    call = read_call(Model, Experts("m.mlp.experts", (), 2, SIZES), engine())
    assert call == {
        "num_experts": 2,
        "hidden_size": 16,
        "intermediate_size": 8,
        "prefix": "m.mlp.experts",
        "ckpt_names": ("gate_proj", "down_proj", "up_proj"),
        "top_k": 1,
    }


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Experts("m.mlp.others", (), 2, SIZES), "builds no experts that are called m.mlp.others"),
        (Experts("m.mlp.experts", (), 3, SIZES), "say 2 experts of .* the checkpoint has 3"),
        (Experts("m.mlp.experts", (), 2, {"w1": (8, 16)}), "the checkpoint has 2 of w1 8 x 16"),
    ],
)
def test_calls_for_other_experts(found, says):
    with pytest.raises(LookupError, match=says):
        read_call(Model, found, engine())


def test_a_block_that_wants_what_is_not_known(monkeypatch):
    def init(self, layer_kind, config):
        pass

    monkeypatch.setattr(Block, "__init__", init)
    with pytest.raises(LookupError, match="Block wants layer_kind, which is not known here"):
        read_call(Model, Experts("m.mlp.experts", (), 2, SIZES), engine())


def test_gathering():
    sizes = {name: tuple(size) for name, size in experts(layers=2, count=3).items()}
    first, second = gather(Model, sizes)
    assert (first.name, first.count) == ("model.layers.0.mlp.experts", 3)
    assert second.sizes == {
        "gate_proj": (256, 512),
        "up_proj": (256, 512),
        "down_proj": (512, 256),
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({P.format(0, 0, "up"): (128, 512)}, "model.layers.0.mlp.experts are not alike"),
        ({P.format(0, 4, "up"): (256, 512)}, "are not alike"),
        ({"m.experts.gate_up": (1, 1)}, "m.experts.gate_up is no <block>.experts.<number>"),
    ],
)
def test_layouts_that_are_not_known(change, says):
    sizes = {name: tuple(size) for name, size in experts(layers=1).items()}
    with pytest.raises(LookupError, match=says):
        gather(Model, sizes | change)
