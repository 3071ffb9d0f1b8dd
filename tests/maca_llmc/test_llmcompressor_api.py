"""What this package leans on in llm-compressor, held to the pinned release.

A failure here after an upgrade says what moved. Mend ``maca_llmc/llmcompressor_api.py`` and
``maca_llmc/modifier.py`` accordingly, then this table.
"""

import inspect
from importlib.metadata import version

import pytest
import torch
import transformers
from compressed_tensors.offload import set_onload_device
from llmcompressor import oneshot
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.modeling.moe import conversion_mappings, linear_experts, linearize
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize, helpers
from llmcompressor.modifiers.gptq import base as gptq_base
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential import SequentialPipeline
from llmcompressor.pipelines.sequential import pipeline as sequential_pipeline
from llmcompressor.recipe import Recipe
from llmcompressor.utils.dist import broadcast_qparams_and_cleanup
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from tiny import loader, random_sequences
from watching import linears

from maca_llmc import MaCaModifier, llmcompressor_api
from maca_llmc.model import loading

RELEASE = "0.14.0.1"

SIGNATURES = {
    "GPTQModifier.on_initialize": (GPTQModifier.on_initialize, "self state kwargs"),
    "GPTQModifier.on_calibration_start": (
        GPTQModifier.on_calibration_start,
        "self state event kwargs",
    ),
    "GPTQModifier.on_sequential_epoch_end": (
        GPTQModifier.on_sequential_epoch_end,
        "self state event modules kwargs",
    ),
    "GPTQModifier.on_finalize": (GPTQModifier.on_finalize, "self state kwargs"),
    "GPTQModifier.calibrate_module": (GPTQModifier.calibrate_module, "self module args _output"),
    "GPTQModifier.compress_modules": (GPTQModifier.compress_modules, "self"),
    "GPTQModifier.compress_module_list": (GPTQModifier.compress_module_list, "self module_list"),
    "GPTQModifier._reduce_hessian_to_target_rank": (
        GPTQModifier._reduce_hessian_to_target_rank,
        "self module_list module_to_rank",
    ),
    "GPTQModifier.register_hook": (
        GPTQModifier.register_hook,
        "self target hook hook_type kwargs",
    ),
    "quantize_weight, as gptq.base calls it": (
        gptq_base.quantize_weight,
        "weights hessians scale zero_point global_scale quant_args blocksize percdamp",
    ),
    "CompressionLogger.set_results": (
        gptq_base.CompressionLogger.set_results,
        "self name loss",
    ),
    "assign_batches": (helpers.assign_batches, "module_list batched_quantization block_size"),
    "batch_key": (helpers.batch_key, "module"),
    "update_batch_qparams": (
        helpers.update_batch_qparams,
        "modules quantized scales zero_points global_scales quant_args",
    ),
    "broadcast_qparams_and_cleanup": (
        broadcast_qparams_and_cleanup,
        "module_list module_to_rank qparam_names skip_cpu",
    ),
    "moe_calibration_context": (moe_context.moe_calibration_context, ""),
    "make_empty_hessian": (helpers.make_empty_hessian, "module device"),
    "get_main_device, as the sequential pipeline calls it": (
        sequential_pipeline.get_main_device,
        "",
    ),
    "infer_sequential_targets": (infer_sequential_targets, "model sequential_targets"),
    "ModifierFactory.register": (ModifierFactory.register, "type_ modifier_class"),
    "Recipe.create_instance": (
        Recipe.create_instance,
        "path_or_modifiers modifier_group_name target_stage",
    ),
    "Recipe.from_modifiers": (Recipe.from_modifiers, "modifiers modifier_group_name"),
    "Recipe.to_dict": (Recipe.to_dict, "self"),
    "QuantizationMixin.resolve_quantization_config": (
        QuantizationMixin.resolve_quantization_config,
        "self",
    ),
    "set_onload_device": (set_onload_device, "model onload_device"),
    "HooksMixin.disable_hooks": (HooksMixin.disable_hooks, "keep"),
    "CalibrationPipeline.__call__": (
        CalibrationPipeline.__call__,
        "model dataloader dataset_args",
    ),
    "SequentialPipeline.__call__": (SequentialPipeline.__call__, "model dataloader dataset_args"),
    "IntermediatesCache.pin_memory": (
        IntermediatesCache.pin_memory,
        "self batch_index input_names",
    ),
    "column_scale_window": (
        helpers.column_scale_window,
        "scale zero_point global_scale g_idx quant_args num_rows i1 i2",
    ),
    "gptq_block_update": (
        gptq_quantize.gptq_block_update,
        "W1 Hinv1 Q1 Err1 losses1 scale zero_point global_scale g_idx quant_args i1",
    ),
    "get_non_linearized_moes": (linearize.get_non_linearized_moes, "model"),
    "load_quantizable_moe": (linearize.load_quantizable_moe, "model_cls"),
    "has_linearize_load_mappings": (
        conversion_mappings.has_linearize_load_mappings,
        "model_type",
    ),
    "LinearExperts2D.get_linear_experts_cls": (
        linear_experts.LinearExperts2D.get_linear_experts_cls,
        "experts_cls",
    ),
}

SCHEME = {"scheme": "W4A16", "ignore": ["lm_head"]}


def test_the_installed_release_is_the_pinned_one():
    assert version("llmcompressor") == RELEASE, (
        f"llmcompressor is {version('llmcompressor')}, this package was written against {RELEASE}: "
        "run this file, mend what it names, then move the pin"
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function, expected = SIGNATURES[name]
    found = " ".join(inspect.signature(function).parameters)
    assert found == expected, f"{name} moved: its parameters were ({expected}), now ({found})"


@pytest.mark.parametrize(
    ("attribute", "empty"),
    [
        ("_hessians", {}),
        ("_num_samples", {}),
        ("_module_names", {}),
        ("_num_compressed_modules", 0),
        ("_rtn_fallback_module_names", []),
    ],
)
def test_private_attribute_of_gptq(attribute, empty):
    assert attribute in GPTQModifier.__private_attributes__, f"GPTQModifier.{attribute} is gone"
    found = GPTQModifier.__private_attributes__[attribute]
    assert (found.default_factory or (lambda: found.default))() == empty


@pytest.mark.parametrize("attribute", ["resolved_targets", "resolved_config"])
def test_property_of_the_quantization_mixin(attribute):
    assert isinstance(getattr(QuantizationMixin, attribute), property), f"{attribute} moved"


def test_a_compression_logger_knows_its_module():
    module = torch.nn.Linear(2, 2)
    assert gptq_base.CompressionLogger(module).module is module


def test_an_empty_hessian_is_square_and_float32():
    hessian = llmcompressor_api.empty_hessian(torch.nn.Linear(6, 3))
    assert hessian.shape == (6, 6) and hessian.dtype == torch.float32 and not hessian.any()


def test_registration_survives_a_refresh():
    ModifierFactory.refresh()
    recipe = Recipe.create_instance("a_stage: {b_modifiers: {MaCaModifier: {scheme: W4A16}}}")
    assert type(recipe.modifiers[0]) is MaCaModifier


# behaviour


def calibrate(model, modifier, lengths=(12, 7), **kwargs):
    oneshot(model=model, dataset=loader(random_sequences(lengths)), recipe=modifier, **kwargs)
    return model


def groups(size):
    weights = {"num_bits": 4, "strategy": "group", "group_size": size}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def masks_of_decoder_layers(model):
    """The attention masks that the layers get in the sequential pipeline, after it traced them."""
    masks = []
    for layer in llmcompressor_api.decoder_layers(model):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")),
            with_kwargs=True,
        )
    fields = SCHEME | {"scheme": None, "config_groups": groups(32), "ignore": ["lm_head"]}
    calibrate(model, GPTQModifier(**fields, targets=["re:.*q_proj"]))
    return masks[1:]  # the first is the tracer's


def test_qwen3_moe_is_calibrated_without_causality_unless_masks_are_kept(tiny_model):
    """Once the first half fails, upstream mended it: keep_causal_masks can go."""
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    assert masks_of_decoder_layers(model) == [None] * 4, (
        "llm-compressor now gives Qwen3-MoE its masks itself: remove keep_causal_masks"
    )

    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    llmcompressor_api.keep_causal_masks(model.config)
    masks = masks_of_decoder_layers(model)
    assert len(masks) == 4  # two sequences, to calibrate and to pass on
    for mask in masks:
        allowed = mask[0, 0] == 0
        assert torch.equal(allowed, torch.ones_like(allowed).tril())


def test_kept_masks_leave_no_trace_in_the_configuration(tiny_model):
    config = tiny_model("llama", num_hidden_layers=1).config
    before = config.to_dict()
    llmcompressor_api.keep_causal_masks(config)
    assert config.to_dict() != before
    llmcompressor_api.forget_causal_masks(config)
    assert config.to_dict() == before


def test_computing_on_decides_where_the_pipeline_computes(tiny_model, monkeypatch):
    def no_choice():
        raise AssertionError("llm-compressor chose a device by itself")

    monkeypatch.setattr(sequential_pipeline, "get_main_device", no_choice)
    fields = SCHEME | {"scheme": None, "config_groups": groups(32)}
    with llmcompressor_api.computing_on(torch.device("cpu")):
        calibrate(tiny_model("llama", num_hidden_layers=1), MaCaModifier(**fields))
    assert sequential_pipeline.get_main_device is no_choice
    with pytest.raises(AssertionError, match="by itself"):
        calibrate(tiny_model("llama", num_hidden_layers=1), MaCaModifier(**fields))


def test_decoder_layers_are_those_that_text_goes_through(tiny_models):
    config = loading.load_config(str(tiny_models("gemma3")))
    layers = llmcompressor_api.decoder_layers(loading.meta_model(config))
    assert [type(layer).__name__ for layer in layers] == ["Gemma3DecoderLayer"] * 2


def test_experts_on_meta_are_named_and_shaped_as_loaded_ones(tiny_models):
    source = str(tiny_models("qwen3_moe"))
    config = loading.load_config(source)
    loaded = {
        name: module.weight.shape for name, module in linears(loading.load_model(source, config))
    }
    assert {n: m.weight.shape for n, m in linears(loading.meta_model(config))} == loaded
    assert sum("experts" in name for name in loaded) == 2 * 4 * 3


def test_loaded_experts_hold_the_checkpoints_weights(tiny_models):
    """Also without torchvision, without which llm-compressor's own way fails."""
    source = str(tiny_models("qwen3_moe"))
    fused = transformers.AutoModelForCausalLM.from_pretrained(source)
    separate = loading.load_model(source, loading.load_config(source))
    sequence = random_sequences([9])[0][None]
    with torch.no_grad():
        expected, found = fused(sequence).logits, separate(sequence).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_observers_are_named_as_in_recipes():
    assert {"memoryless_minmax", "memoryless_mse", "mse"} <= set(llmcompressor_api.observer_names())
