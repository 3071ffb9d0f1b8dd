"""What is made of vLLM's answers, which are written out here."""

import pytest
from maca_serve.doctor.checks import Contents, Problem
from maca_serve.doctor.findings import describe
from maca_serve.doctor.layer_problems import layer_problems

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 9,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": GROUP},
    },
}


def entry(layer="model.layers.0.o_proj", **changes):
    return {
        "layer": layer,
        "class": "RowParallelLinear",
        "parts": [layer],
        "experts": None,
        "outs": [576],
        "shape": [576, 576],
        "partition": [576, 576],
        "quantized": True,
        "scheme": "CompressedTensorsWNA16",
        "kernel": "MarlinLinearKernel",
        "needs": [],
        "refusals": [],
        "error": None,
        "missing_ops": [],
        **changes,
    }


def refusal(kernel, reason="no", needs=()):
    return {"kernel": kernel, "reason": reason, "needs": list(needs)}


NO_KERNEL = {
    "kernel": None,
    "error": "ValueError: Failed to find a kernel. Reasons: many",
    "refusals": [refusal("A"), refusal("HummingLinearKernel", "not installed", ["humming"])],
}
HUMMING = {"with_packages": {"kernel": "HummingLinearKernel", "needs": ["humming"]}}


def experts(layer="model.layers.0.mlp.experts", **changes):
    parts = [f"{layer}.{n}.{part}_proj" for n in range(8) for part in ("gate", "up", "down")]
    down = {"outs": [256], "shape": [256, 128], "partition": [256, 128]}
    sizes = {"outs": [128, 128], "shape": [256, 256], "partition": [256, 256], "down": down}
    names = {"class": "RoutedExperts", "parts": parts, "experts": 8, "kernel": "MarlinExperts"}
    return entry(layer, **names | sizes | changes)


def answer(*layers, simulated=True, ranks=1, variants=(), refused=None, unasked=None, **more):
    target = {"name": "x", "capability": 80, "simulated": simulated, "tensor_parallel": ranks}
    return {
        "vllm": "0",
        "target": target,
        "unasked": unasked,
        "refused": refused,
        "dtype": "bfloat16",
        "layers": list(layers),
        "variants": list(variants),
        **more,
    }


def diagnose(*layers, problems=(), config=CONFIG, quantized=None, **options):
    names = {part for layer in layers for part in layer["parts"]}
    contents = Contents({}, names if quantized is None else quantized, list(problems))
    return describe("dir", "W4A16", config, contents, answer(*layers, **options))


def whats(diagnosis):
    return [problem["what"] for problem in diagnosis["problems"]]


def test_it_loads():
    diagnosis = diagnose(entry(), entry("model.layers.1.o_proj"))
    assert diagnosis["verdict"] == "loads"
    assert diagnosis["problems"] == diagnosis["changes"] == []
    (group,) = diagnosis["layers"]
    assert (group["layer"], group["count"]) == ("model.layers.*.o_proj", 2)


def test_errors_that_name_their_layer_are_one():
    names = [f"model.layers.{n}.o_proj" for n in range(2)]
    errors = [f"ValueError: 288 for layer '{name}' is not divisible by 64" for name in names]
    layers = [entry(n, kernel=None, error=e) for n, e in zip(names, errors, strict=True)]
    diagnosis = diagnose(*layers)
    assert diagnosis["layers"][0]["count"] == diagnosis["problems"][0]["count"] == 2
    assert whats(diagnosis) == ["ValueError: 288 is not divisible by 64"]


def test_layers_that_look_different_stay_apart():
    diagnosis = diagnose(entry(), entry("model.layers.1.o_proj", kernel="MacheteLinearKernel"))
    assert [group["count"] for group in diagnosis["layers"]] == [1, 1]


@pytest.mark.parametrize("reasons", [" many", ""])
def test_no_kernel(reasons):
    error = f"ValueError: Failed to find a kernel. Reasons:{reasons}"
    diagnosis = diagnose(entry(**NO_KERNEL | {"error": error}))
    assert diagnosis["verdict"] == "does not load"
    assert whats(diagnosis) == ["ValueError: Failed to find a kernel."]
    assert "no change that was tried helps" in diagnosis["problems"][0]["cure"]


def test_missing_package_is_a_condition_elsewhere_and_an_error_here():
    elsewhere = diagnose(entry(**NO_KERNEL, **HUMMING))
    assert elsewhere["verdict"] == "conditional"
    assert elsewhere["problems"][0]["severity"] == "warning"
    here = diagnose(entry(**NO_KERNEL, **HUMMING), simulated=False)
    assert here["verdict"] == "does not load"
    assert here["problems"][0]["cure"] == "pip install humming-kernels"


def test_fallback_names_both_kernels_and_the_reason():
    refusals = [refusal("MacheteLinearKernel", "must be divisible by 128")]
    diagnosis = diagnose(entry(refusals=refusals, roomy_kernel="MacheteLinearKernel"))
    assert diagnosis["verdict"] == "loads"
    assert whats(diagnosis) == [
        "falls back from MacheteLinearKernel to MarlinLinearKernel: must be divisible by 128"
    ]
    assert diagnosis["layers"][0]["falls_back_from"] == "MacheteLinearKernel"


def test_changes_that_help_all_layers_and_those_that_do_not():
    two = [entry(**NO_KERNEL), entry("model.layers.0.up_proj", refusals=[refusal("A")])]
    first, second = entry(), entry("model.layers.0.up_proj", refusals=[refusal("A")])
    worse = entry("model.layers.0.up_proj", refusals=[refusal("A"), refusal("B")])
    still = entry(**NO_KERNEL)
    variants = [
        {"change": "good", "refused": None, "layers": [first, second]},
        {"change": "worse for one", "refused": None, "layers": [first, worse]},
        {"change": "one without", "refused": None, "layers": [still, entry(second["layer"])]},
        {"change": "refused", "refused": "why", "layers": []},
    ]
    diagnosis = diagnose(*two, variants=variants)
    assert diagnosis["changes"] == [{"change": "good", "kernels": ["MarlinLinearKernel"]}]
    assert diagnosis["problems"][0]["cure"] == "make one of the changes below"


def test_no_changes_where_nothing_is_wrong():
    better = entry()
    variants = [{"change": "x", "refused": None, "layers": [better]}]
    assert diagnose(entry(refusals=[refusal("A")]), variants=variants)["changes"] == []


def test_heads_and_ranks():
    diagnosis = diagnose(entry(), ranks=2)
    assert diagnosis["verdict"] == "does not load"
    assert "9 attention heads cannot be shared by 2" in whats(diagnosis)[0]
    assert diagnosis["problems"][0]["cure"] == "use a tensor-parallel size of 1, 3, 9"


def test_missing_operators_of_the_build():
    diagnosis = diagnose(entry(missing_ops=["cpu_gemm_wna16"]), simulated=False)
    assert diagnosis["verdict"] == "does not load"
    assert "its build here lacks cpu_gemm_wna16" in whats(diagnosis)[0]
    assert "a CPU with AVX-512" in diagnosis["problems"][0]["cure"]
    diagnosis = diagnose(entry(missing_ops=["static_scaled_fp8_quant"]), simulated=False)
    assert diagnosis["verdict"] == "does not load"
    assert "a scale per channel or per block" in diagnosis["problems"][0]["cure"]


def test_activations_left_at_16_bits():
    inputs = {"num_bits": 8, "dynamic": True}
    quantization = {**CONFIG["quantization_config"]}
    quantization["config_groups"] = {"a": {**GROUP, "input_activations": inputs}}
    config = {**CONFIG, "quantization_config": quantization}
    diagnosis = diagnose(entry(scheme="CompressedTensorsW8A16Fp8"), config=config)
    assert "activations stay at 16 bits" in whats(diagnosis)[0]


def test_methods_with_code_of_their_own():
    diagnosis = diagnose(entry(kernel=None, scheme="AutoAWQLinearMethod"))
    assert diagnosis["verdict"] == "loads"
    assert "runs on AutoAWQLinearMethod, which is none" in whats(diagnosis)[0]


def test_tensors_and_config_that_disagree():
    diagnosis = diagnose(entry(), quantized=set())
    assert diagnosis["verdict"] == "does not load"
    assert "as quantized here, and its tensors are otherwise" in whats(diagnosis)[0]


def test_a_quantized_head_that_no_target_names():
    head = entry("lm_head", **{"class": "ParallelLMHead", "quantized": False, "kernel": None})
    (problem,) = diagnose(head, quantized={"lm_head"})["problems"]
    assert problem["what"] == "vLLM takes an output head for quantized only where a target names it"
    assert problem["cure"] == "add 're:.*lm_head$' to the targets of its group"


def test_fused_modules_of_which_some_are_quantized():
    fused = entry("m.gate_up_proj", parts=["m.gate_proj", "m.up_proj"])
    diagnosis = diagnose(fused, quantized={"m.up_proj"})
    assert "gate_up_proj fuses modules of which only some are quantized" in whats(diagnosis)[0]
    assert diagnosis["problems"][0]["cure"] == "quantize all of gate_proj, up_proj alike, or none"


def test_experts_are_one_layer():
    diagnosis = diagnose(experts(), experts("model.layers.1.mlp.experts"))
    assert diagnosis["verdict"] == "loads" and diagnosis["problems"] == []
    (group,) = diagnosis["layers"]
    assert (group["layer"], group["count"]) == ("model.layers.*.mlp.experts", 2)
    assert group["experts"] == 8
    of_one = [f"model.layers.*.mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")]
    assert group["parts"] == of_one


def test_experts_were_not_asked():
    unasked = [{"reason": "LookupError: of their own kind", "modules": ["m.experts.0.up_proj"]}]
    diagnosis = diagnose(entry(), unasked_experts=unasked)
    assert diagnosis["verdict"] == "unknown"
    assert whats(diagnosis)[0].endswith("which were not asked: LookupError: of their own kind")


def test_no_class_of_experts():
    refusals = [
        refusal("TritonExperts", "kernel does not support current device cpu"),
        refusal("CPUExpertsInt8", "kernel requires hidden dim divisible by 32"),
    ]
    error = "NotImplementedError: No Int8 MoE backend supports this (weight_key=QuantKey(i8))"
    diagnosis = diagnose(experts(kernel=None, error=error, refusals=refusals))
    assert diagnosis["verdict"] == "does not load"
    assert whats(diagnosis) == [
        "none of vLLM's experts classes supports this;"
        " CPUExpertsInt8: kernel requires hidden dim divisible by 32"
    ]


def test_experts_that_round_activations():
    diagnosis = diagnose(experts(kernel="CPUExpertsInt4"), simulated=False)
    assert diagnosis["verdict"] == "loads"
    assert "rounds the experts' activations to 8 bits" in whats(diagnosis)[0]


def test_words_of_down_that_ranks_tear():
    down = {"outs": [256], "shape": [256, 128], "partition": [256, 4]}
    diagnosis = diagnose(experts(down=down))
    assert diagnosis["verdict"] == "does not load"
    assert "4 input features of a rank x 4 bits are not whole 32-bit words" in whats(diagnosis)[0]


def test_heads_that_attention_does_not_have():
    attention = {"backend": "CPU_ATTN", "head_size": 60, "sizes": [32, 64], "refused": "no"}
    diagnosis = diagnose(entry(), attention=attention)
    assert diagnosis["verdict"] == "does not load"
    assert whats(diagnosis) == ["vLLM's CPU_ATTN cannot run attention heads of 60: no"]
    assert diagnosis["problems"][0]["cure"].endswith("CPU_ATTN has 32, 64")
    assert diagnosis["attention"] == attention
    refused = attention | {"refused": None}
    assert diagnose(entry(), attention=refused)["verdict"] == "loads"
    assert diagnose(entry())["attention"] is None


@pytest.mark.parametrize(
    ("unasked", "simulated", "verdict"),
    [
        ("ModuleNotFoundError: torchvision", True, "unknown"),
        ("ModuleNotFoundError: torchvision", False, "does not load"),
        ("LookupError: no model class", False, "unknown"),
    ],
)
def test_models_that_cannot_be_asked_about(unasked, simulated, verdict):
    assert diagnose(unasked=unasked, simulated=simulated)["verdict"] == verdict


def test_refused_before_any_layer():
    diagnosis = diagnose(refused="gptq needs compute capability 6.0")
    assert diagnosis["verdict"] == "does not load"
    assert whats(diagnosis) == ["gptq needs compute capability 6.0"]


def test_wrong_tensors_outweigh_kernels_and_stand_first():
    problems = [Problem("note", "n"), Problem("error", "wrong shape", "quantize again", ["m"])]
    diagnosis = diagnose(entry(), problems=problems)
    assert diagnosis["verdict"] == "does not load"
    assert whats(diagnosis) == ["wrong shape", "n"]


AVX = ["avx2", "avx512f"]


@pytest.mark.parametrize(
    ("kernel", "flags", "by"),
    [
        ("CPUWNA16LinearKernel", [*AVX, "amx_int8"], "AMX"),
        ("CPUWNA16LinearKernel", AVX, None),
        ("ZentorchWNA16LinearKernel", AVX, "zentorch"),
        ("CPUInt8ScaledMMLinearKernel", [*AVX, "amx_int8"], None),
    ],
)
def test_what_plain_vllm_would_make_of_4_bit_weights_on_this_cpu(kernel, flags, by):
    one = entry(kernel=kernel, with_packages=None, falls_back_from=None)
    here = {"gpus": [], "cpu_flags": flags}
    found = layer_problems(one, CONFIG, answer(one, simulated=False), here)
    said = [problem.what for problem in found if "round activations" in problem.what]
    assert said == (
        [f"with {by} plain `vllm serve` would round activations to 8 bits"] if by else []
    )


NO_SCHEME = (
    "NotImplementedError: No compressed-tensors compatible scheme was found for"
    " layer_name='{}', weight_quant=QuantizationArgs(num_bits=4)"
)


@pytest.mark.parametrize("said", [NO_SCHEME, "AttributeError: 'NoneType' object has no attribute"])
def test_one_finding_for_all_layers_that_have_no_scheme(said):
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("o_proj", "down_proj")]
    layers = [entry(name, kernel=None, error=said.format(name)) for name in names]
    (problem,) = [p for p in diagnose(*layers)["problems"] if "no code" in p["what"]]
    assert problem["count"] == 6
    what = "vLLM has no code for weights of 4 bits (int, one scale per group) alone"
    assert problem["what"] == what


def test_an_error_that_names_its_layer_is_said_once():
    names = [f"model.layers.{i}.o_proj" for i in range(3)]
    layers = [entry(name, kernel=None, error=f"ValueError: {name} is odd") for name in names]
    (problem,) = [p for p in diagnose(*layers)["problems"] if "odd" in p["what"]]
    assert problem["count"] == 3 and problem["what"] == "ValueError: model.layers.*.o_proj is odd"


def test_fused_parts_of_unlike_schemes():
    groups = {"a": {**GROUP, "targets": ["re:.*v_proj"], "weights": {**WEIGHTS, "group_size": 32}}}
    quantization = CONFIG["quantization_config"] | {"config_groups": {**groups, "b": GROUP}}
    config = CONFIG | {"quantization_config": quantization}
    parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    fused = entry("model.layers.0.self_attn.qkv_proj", parts=parts)
    whats = [p["what"] for p in diagnose(fused, config=config)["problems"]]
    assert "qkv_proj fuses modules of unlike schemes, and vLLM reads all as the first" in whats
    assert not any("unlike" in p["what"] for p in diagnose(fused)["problems"])


FOUND = {"unasked": None, "refused": [], "missing": [], "unread": [], "cut": [], "attention": None}


def test_what_the_loader_lacks_is_an_error():
    missing = [f"model.layers.1.{name}" for name in ("a.weight", "a.weight_scale")]
    found = diagnose(entry(), loading=FOUND | {"missing": missing})
    (problem,) = [p for p in found["problems"] if "lack it" in p["what"]]
    assert problem["count"] == 2 and found["verdict"] == "does not load"


def test_a_model_that_cannot_be_built_here():
    loading = FOUND | {"unasked": "ValueError: odd"}
    config = CONFIG | {"num_attention_heads": 8}
    elsewhere = diagnose(entry(), config=config, loading=loading)
    assert elsewhere["problems"][-1]["severity"] == "warning" and elsewhere["verdict"] == "loads"
    here = diagnose(entry(), config=config, loading=loading, simulated=False)
    assert here["verdict"] == "does not load" and "odd" in here["problems"][0]["what"]


def signed(kernel, form="pack-quantized"):
    layer = entry(kernel=kernel)
    quantization = CONFIG["quantization_config"] | {"format": form}
    config = CONFIG | {"num_attention_heads": 8, "quantization_config": quantization}
    contents = Contents({}, set(layer["parts"]), [], signed=set(layer["parts"]))
    found = describe("dir", "W4A16", config, contents, answer(layer))["problems"]
    return [p for p in found if "negative" in p["what"]]


def test_kernels_that_take_no_negative_scales(monkeypatch):
    monkeypatch.delenv("VLLM_MARLIN_INPUT_DTYPE", raising=False)
    assert signed("MacheteLinearKernel") == []
    (note,) = signed("MarlinLinearKernel")
    assert note["severity"] == "note" and "VLLM_MARLIN_INPUT_DTYPE" in note["what"]
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    assert signed("MarlinExperts")[0]["severity"] == "error"
    (error,) = signed("MarlinNvFp4LinearKernel", "nvfp4-pack-quantized")
    assert error["severity"] == "error" and "signed_scales" in error["cure"]
