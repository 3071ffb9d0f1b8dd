"""The modifier inside llm-compressor's own pipelines, against a float64 brute force."""

from contextlib import contextmanager

import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from tiny import loader, random_sequences
from watching import SCHEME, counts_of, hessians_of

from maca_llmc import MaCaModifier
from maca_llmc.llmcompressor_api import keep_causal_masks

LENGTHS = [24, 5, 40, 13]


class Watching:
    """Mixin that keeps what a modifier is about to quantize."""

    def watch(self, model, callback):
        object.__setattr__(self, "_watch", (model, callback))
        return self

    def compress_module_list(self, module_list):
        model, callback = self._watch
        callback(model, hessians_of(self, module_list), counts_of(self, module_list))
        super().compress_module_list(module_list)


class WatchedMaCa(Watching, MaCaModifier):
    pass


class WatchedGPTQ(Watching, GPTQModifier):
    pass


@contextmanager
def plain_weights(model):
    """Forward without fake quantization, whatever state the pipeline has the model in."""
    before = {
        m: m.quantization_enabled for m in model.modules() if hasattr(m, "quantization_enabled")
    }
    model.apply(disable_quantization)
    yield
    for module, enabled in before.items():
        module.quantization_enabled = enabled


@torch.no_grad()
def inputs_of(model, names, sequence):
    """What each named module receives when ``sequence`` goes through the model alone."""
    seen, handles = {}, []
    for name in names:

        def hook(module, args, name=name):
            seen[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with HooksMixin.disable_hooks(), plain_weights(model):
        model(input_ids=sequence[None], attention_mask=torch.ones_like(sequence)[None])
    for handle in handles:
        handle.remove()
    return seen


def brute_force_hessians(model, names, sequences, exponent, scales, first=1.0):
    """Every prefix that counts, run by itself: 2 * sum of l^-p x x^T, in float64.

    The first row counts ``first`` times.
    """
    hessians = {}
    for sequence in sequences:
        prefixes = {scale for scale in scales or () if scale < len(sequence)} | {len(sequence)}
        for prefix in prefixes:
            for name, rows in inputs_of(model, names, sequence[:prefix]).items():
                rows[0] *= first**0.5
                term = 2 * (prefix / len(sequences[0])) ** -exponent * rows.T @ rows
                hessians[name] = hessians.get(name, 0) + term
    return hessians


def run(model, modifier, data, **kwargs):
    oneshot(model=model, dataset=data, recipe=modifier, **kwargs)
    return model


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    ("exponent", "scales", "first"),
    [
        (0.0, None, 1.0),
        (1.0, None, 1.0),
        (0.5, [8, 16, 32], 1.0),
        (1.0, [8, 16, 32], 1.0),
        (0.0, None, 16.0),
        (1.0, [1, 8], 0.25),
    ],
)
def test_hessian_is_the_sum_over_sequences_run_alone(
    tiny_model, family, exponent, scales, first, pipeline
):
    sequences = random_sequences(LENGTHS)
    seen = []

    def check(model, hessians, _counts):
        expected = brute_force_hessians(model, hessians, sequences, exponent, scales, first)
        for name, hessian in hessians.items():
            error = torch.linalg.norm(hessian - expected[name]) / torch.linalg.norm(expected[name])
            assert error < 1e-5, (name, float(error))
            seen.append(name)

    model = tiny_model(family)
    fields = {"length_exponent": exponent, "nested_scales": scales, "first_token_weight": first}
    modifier = WatchedMaCa(**SCHEME, **fields)
    run(model, modifier.watch(model, check), loader(sequences), pipeline=pipeline)
    assert len(seen) == 14


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_batches_and_padding_change_nothing(tiny_model, family, side, pipeline):
    sequences = random_sequences([*LENGTHS, 40, 8])
    results = []
    for batch_size in (1, 4):
        found = {}
        model = tiny_model(family)
        modifier = WatchedMaCa(**SCHEME, nested_scales=[8, 16])
        modifier.watch(model, lambda model, hessians, counts, found=found: found.update(hessians))
        run(model, modifier, loader(sequences, batch_size, side), pipeline=pipeline)
        results.append(found)
    assert results[0].keys() == results[1].keys() and len(results[0]) >= 14
    for name, alone in results[0].items():
        if pipeline == "sequential" and ".layers.0." not in name:
            continue  # a rounding tie in layer 0 may move what layer 1 sees
        error = torch.linalg.norm(results[1][name] - alone) / torch.linalg.norm(alone)
        assert error < 1e-5, (name, float(error))


def weights_of(model):
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }


AS_STOCK = {"length_exponent": 0.0, "first_token_weight": 1.0, "hessian_scales": False}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_exponent_zero_is_stock_gptq(tiny_model, family):
    sequences = random_sequences(LENGTHS)
    found, quantized = [], []
    for modifier_class, fields in ((WatchedGPTQ, {}), (WatchedMaCa, AS_STOCK)):
        layer = {}

        def keep(model, hessians, counts, layer=layer):
            for name, hessian in hessians.items():
                layer[name] = hessian / counts[name]

        model = tiny_model(family)
        keep_causal_masks(model.config)  # without it stock runs Qwen3-MoE without any mask
        run(model, modifier_class(**SCHEME, **fields).watch(model, keep), loader(sequences))
        found.append(layer)
        quantized.append(weights_of(model))
    for name, stock in found[0].items():
        if ".layers.0.self_attn" in name and "o_proj" not in name:
            # identical inputs in both runs: no quantized module came before these
            assert torch.linalg.norm(found[1][name] - stock) < 1e-6 * torch.linalg.norm(stock)
    same = [
        (quantized[0][name] == quantized[1][name]).float().mean().item() for name in quantized[0]
    ]
    assert min(same) > 0.99, "more than rounding ties differ from stock GPTQ"


def quantized_from_the_same_hessians(tiny_model, scheme):
    """Weights by stock GPTQ and by MaCa, both solved from one and the same set of Hessians."""
    shared, quantized = {}, []
    for modifier_class, fields in ((WatchedGPTQ, {}), (WatchedMaCa, AS_STOCK)):
        model = tiny_model("llama")
        modifier = modifier_class(**scheme, **fields)

        def swap(model, hessians, counts, modifier=modifier):
            for module, name in modifier._module_names.items():
                if name in hessians:
                    shared.setdefault(name, hessians[name] / counts[name])
                if name in hessians and module in modifier._hessians:
                    modifier._hessians[module] = shared[name] * counts[name]

        data = loader(random_sequences(LENGTHS))
        run(model, modifier.watch(model, swap), data, pipeline="basic")
        quantized.append(weights_of(model))
    assert len(quantized[0]) == 14
    return quantized


def test_the_same_hessian_gives_the_same_codes_as_stock(tiny_model):
    quantized = quantized_from_the_same_hessians(tiny_model, SCHEME)
    for name, stock in quantized[0].items():
        assert torch.equal(stock, quantized[1][name]), name


def test_normalising_equal_lengths_changes_no_code(tiny_model):
    sequences = random_sequences([21] * 6)
    quantized = []
    for exponent in (0.0, 1.0):
        model = tiny_model("llama")
        run(model, MaCaModifier(**SCHEME, length_exponent=exponent), loader(sequences))
        quantized.append(weights_of(model))
    for name, expected in quantized[0].items():
        assert torch.equal(expected, quantized[1][name]), name


def test_mixed_lengths_do_change_codes(tiny_model):
    """The guard of the test above: it could not pass by the exponent being ignored."""
    quantized = []
    for exponent in (0.0, 1.0):
        model = tiny_model("llama")
        run(
            model,
            MaCaModifier(**SCHEME, length_exponent=exponent),
            loader(random_sequences(LENGTHS)),
        )
        quantized.append(weights_of(model))
    assert any(not torch.equal(quantized[0][name], quantized[1][name]) for name in quantized[0])


def test_routed_tokens_get_the_mean_weight_of_their_batch(tiny_model):
    sequences = random_sequences([24, 6])
    found = {}
    model = tiny_model("qwen3_moe")
    modifier = WatchedMaCa(**SCHEME, first_token_weight=1.0)
    modifier.watch(model, lambda model, hessians, counts: found.update(hessians))
    rows = {}
    original = MaCaModifier.calibrate_module

    def capture(self, module, args, output):
        rows.setdefault(self._module_names[module], []).append(args[0].detach().double())
        original(self, module, args, output)

    WatchedMaCa.calibrate_module = capture
    try:
        run(model, modifier, loader(sequences), pipeline="basic", moe_calibrate_all_experts=False)
    finally:
        del WatchedMaCa.calibrate_module
    experts = [name for name in found if "experts" in name and name.endswith("gate_proj")]
    assert experts
    for name in experts:
        # batches of one: the mean weight is the sequence's own, (L / first L)^-1
        expected = sum(
            2 * weight * batch.T @ batch
            for batch, weight in zip(rows[name], (1.0, 4.0), strict=True)
        )
        if expected.any():
            assert torch.linalg.norm(found[name] - expected) < 1e-5 * torch.linalg.norm(expected)


def test_routed_tokens_of_a_padded_batch_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"experts\.\d+\.\w+_proj.*batches of one"):
        run(
            tiny_model("qwen3_moe"),
            MaCaModifier(**SCHEME),
            loader(random_sequences([24, 6]), batch_size=2),
            moe_calibrate_all_experts=False,
        )


@pytest.mark.parametrize("dampening", [0.01, 0.0, None])
def test_a_hessian_that_is_not_positive_definite_gets_more_dampening_and_is_named(
    tiny_model, dampening
):
    model, said = tiny_model("llama"), []

    def spoil(model, hessians, counts):
        for module, name in modifier._module_names.items():
            if name in hessians and name.endswith("layers.0.self_attn.q_proj"):
                hessian = modifier._hessians[module]
                hessian.copy_(torch.eye(len(hessian)))
                hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05

    modifier = WatchedMaCa(**SCHEME, dampening_frac=dampening)
    before = weights_of(model) | {
        n: m.weight.clone() for n, m in model.named_modules() if n.endswith("q_proj")
    }
    handle = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        run(model, modifier.watch(model, spoil), loader(random_sequences(LENGTHS)))
    finally:
        logger.remove(handle)
    spoiled = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    raised = modifier.raised_dampening
    assert {name: raised[name] for name in spoiled} == dict.fromkeys(spoiled, pytest.approx(0.1))
    (warning,) = [message for message in said if "positive definite" in message]
    assert "q_proj (0.1)" in warning and f"with dampening {dampening or 0:g} and got" in warning
    if dampening:
        assert raised.keys() == set(spoiled) and "3 of 14 modules" in warning
    assert not torch.equal(model.get_submodule(spoiled[0]).weight, before[spoiled[0]])


def test_modules_of_one_input_share_one_hessian(tiny_model):
    shared = []

    class Seen(MaCaModifier):
        def compress_module_list(self, module_list):
            shared.extend(
                sorted(self._module_names[member].split(".")[-1] for member in group.members)
                for group in self._groups.values()
            )
            super().compress_module_list(module_list)

    run(tiny_model("llama"), Seen(**SCHEME), loader(random_sequences(LENGTHS)))
    layer = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert shared == layer * 2


def test_all_experts_share_one_hessian(tiny_model):
    sizes = []

    class Seen(MaCaModifier):
        def compress_module_list(self, module_list):
            sizes.extend(len(group.members) for group in self._groups.values())
            super().compress_module_list(module_list)

    run(tiny_model("qwen3_moe"), Seen(**SCHEME), loader(random_sequences(LENGTHS)))
    experts = 4
    assert sizes == [3, 1, 2 * experts, *[1] * experts] * 2


@pytest.mark.parametrize(
    "weights",
    {
        "channel": {"num_bits": 4, "strategy": "channel"},
        "tensor": {"num_bits": 8, "strategy": "tensor", "type": "float"},
        "asymmetric": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
        "weight ordering": {
            "num_bits": 4,
            "strategy": "group",
            "group_size": 32,
            "actorder": "weight",
        },
        "no ordering": {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": None},
        "block": {"num_bits": 8, "strategy": "block", "block_structure": [16, 16], "type": "float"},
    }.values(),
    ids=["channel", "tensor", "asymmetric", "weight ordering", "no ordering", "block"],
)
def test_shared_solves_give_the_codes_of_stock(tiny_model, weights):
    """Layer 0's q, k and v and gate and up: same inputs, stacked here and one by one in stock."""
    scheme = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    if weights.get("actorder", "") is None:
        scheme["actorder"] = None
    quantized = quantized_from_the_same_hessians(tiny_model, scheme)
    for name, stock in quantized[0].items():
        assert torch.equal(stock, quantized[1][name]), name


@pytest.mark.parametrize("kinds", [("q_proj", "k_proj"), ("gate_proj",)])
def test_different_arguments_within_a_group_are_solved_apart(tiny_model, kinds):
    """Some of a group in 8 bits: everything ends as when each is solved with stock's solver."""
    groups = {
        "group_0": {
            "targets": [f"re:.*{kind}" for kind in kinds],
            "weights": {"num_bits": 8, "strategy": "channel"},
        },
        "group_1": SCHEME["config_groups"]["group_0"]
        | {
            "targets": [
                "re:.*(v|o|gate|up|down)_proj"
                if "q_proj" in kinds
                else "re:.*(q|k|v|o|up|down)_proj"
            ]
        },
    }
    quantized = quantized_from_the_same_hessians(
        tiny_model, {"config_groups": groups, "ignore": ["lm_head"]}
    )
    for name, stock in quantized[0].items():
        assert torch.equal(stock, quantized[1][name]), name


def test_nan_in_activations_names_the_module(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj.*NaN or infinity"):
        run(model, MaCaModifier(**SCHEME), loader(random_sequences(LENGTHS)))


def test_a_module_that_is_never_called_is_an_error(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].spare = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"layers\.0\.spare.*ignore list"):
        run(model, MaCaModifier(**SCHEME), loader(random_sequences(LENGTHS)))


def test_nested_refuses_models_whose_prefixes_differ(tiny_model):
    model = tiny_model("llama")
    model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ValueError, match="remove nested_scales"):
        run(model, MaCaModifier(**SCHEME, nested_scales=[8]), loader(random_sequences([16])))


INT4 = SCHEME["config_groups"]["group_0"]
ONLY_READ_BY_THE_COMMAND = {
    "ordering by group": ({"actorder": "group"}, r"actorder='group' has been removed"),
    "an ignored name that is none": ({"ignore": ["lm_haed"]}, "ignores 'lm_haed', which is no mod"),
    "a group left with nothing": (
        {"config_groups": SCHEME["config_groups"] | {"g": INT4 | {"targets": ["re:.*router"]}}},
        "g has nothing to quantize",
    ),
    "two groups of one Linear": (
        {"config_groups": {"f": INT4, "g": INT4}},
        "f and g both target 'Linear'",
    ),
    "embeddings": (
        {"config_groups": {"g": INT4 | {"targets": ["Linear", "Embedding"]}}},
        r"quantizes model\.embed_tokens, an embedding",
    ),
    "bits that nothing reads": (
        {"config_groups": {"g": INT4 | {"weights": {"num_bits": 9, "strategy": "channel"}}}},
        "weights of 9 bits",
    ),
    "group size": (
        {"config_groups": {"g": INT4 | {"weights": {"num_bits": 4, "group_size": 64}}}},
        r"group size 64 does not divide .*: 32, 16 would",
    ),
    "group size, llm-compressor's check off": (
        {
            "config_groups": {"g": INT4 | {"weights": {"num_bits": 4, "group_size": 64}}},
            "bypass_divisibility_checks": True,
        },
        r"group size 64 does not divide .*: 32, 16 would",
    ),
    "scales that are rounded when written": (
        {"config_groups": {"g": INT4 | {"weights": INT4["weights"] | {"type": "float"}}}},
        "would be written with other values",
    ),
    "a cache that nothing reads": (
        {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
        "kv_cache_scheme: vLLM reads",
    ),
    "an ignored attention": (
        {
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            "ignore": ["lm_head", "re:.*self_attn.*"],
        },
        "quantizes the KV cache and ignores",
    ),
    "an observer that there is not": ({"weight_observer": "mean"}, "no observer 'mean'"),
    "the head, by GPTAQ": ({"ignore": [], "gptaq_alpha": 0.5}, "within decoder layers"),
}


@pytest.mark.parametrize("case", ONLY_READ_BY_THE_COMMAND)
def test_plain_oneshot_refuses_what_the_command_refuses(tiny_model, case):
    fields, says = ONLY_READ_BY_THE_COMMAND[case]
    data = loader(random_sequences([16]))
    with pytest.raises(ValueError, match=says):
        run(tiny_model("llama"), MaCaModifier(**SCHEME | fields), data)


def test_plain_oneshot_refuses_a_tied_head(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head, which is the input embedding, too"):
        run(model, MaCaModifier(**SCHEME | {"ignore": []}), loader(random_sequences([16])))


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([GPTQModifier(**SCHEME)], "is quantized by MaCaModifier and by GPTQModifier"),
        ([MaCaModifier(**SCHEME)], "has MaCaModifier 2 times"),
        ([SmoothQuantModifier()], "SmoothQuantModifier would change what is quantized by then"),
    ],
)
def test_plain_oneshot_refuses_modifiers_that_do_not_go_together(tiny_model, others, says):
    with pytest.raises(ValueError, match=says):
        run(tiny_model("llama"), [MaCaModifier(**SCHEME), *others], loader(random_sequences([16])))


def test_plain_oneshot_names_fused_parts_that_differ(tiny_model):
    said = []
    handle = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        modifier = MaCaModifier(**SCHEME | {"ignore": ["lm_head", "re:.*v_proj"]})
        run(tiny_model("llama"), modifier, loader(random_sequences([16])))
    finally:
        logger.remove(handle)
    (message,) = [message for message in said if "vLLM makes one" in message]
    assert message.startswith("q_proj, k_proj, v_proj of model.layers.0.self_attn have different")


@pytest.mark.parametrize("signed", [True, False])
def test_scales_are_negative_only_where_they_may_be(tiny_model, signed):
    model = tiny_model("llama")
    modifier = MaCaModifier(**SCHEME, **({} if signed else {"signed_scales": False}))
    run(model, modifier, loader(random_sequences(LENGTHS)))
    scales = [m.weight_scale for m in model.modules() if hasattr(m, "weight_scale")]
    assert len(scales) == 14 and any(bool((scale < 0).any()) for scale in scales) == signed


@pytest.mark.parametrize(
    "fields",
    [
        {"length_exponent": 1.5},
        {"length_exponent": -0.1},
        {"first_token_weight": 0.0},
        {"nested_scales": []},
        {"nested_scales": [0, 4]},
        {"nested_scales": [8, 4]},
        {"length_exponnent": 1.0},
    ],
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        MaCaModifier(**SCHEME, **fields)
