"""The layer pipeline against llm-compressor's sequential one."""

from types import SimpleNamespace

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from loguru import logger
from tiny import loader, random_sequences
from torch.utils._pytree import tree_leaves
from watching import SCHEME, hessians_of

from maca_llmc import MaCaModifier
from maca_llmc.calibrate import pipeline
from maca_llmc.calibrate.hidden_states import HiddenStates
from maca_llmc.calibrate.pipeline import NAME, UnsupportedModelError, move, record_batches
from maca_llmc.common.errors import CalibrationError
from maca_llmc.llmcompressor_api import computing_on, decoder_layers

LENGTHS = [24, 6, 40, 13]
CPU = torch.device("cpu")


class Watched(MaCaModifier):
    """Keeps the Hessians of the first layer."""

    def compress_module_list(self, module_list):
        found = getattr(self, "found", {}) | hessians_of(self, module_list)
        object.__setattr__(self, "found", found)
        super().compress_module_list(module_list)


def calibrate(model, data, pipeline, after=(), **fields):
    modifier = Watched(**SCHEME | {"nested_scales": [8, 16]} | fields)
    with computing_on(CPU):
        oneshot(model=model, dataset=data, recipe=[*after, modifier], pipeline=pipeline)
    return modifier.found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize(("batch_size", "side"), [(1, "right"), (4, "right"), (4, "left")])
def test_hessians_are_those_of_the_sequential_pipeline(tiny_model, family, batch_size, side):
    data = loader(random_sequences(LENGTHS), batch_size, side)
    stock = calibrate(tiny_model(family), data, "sequential")
    ours = calibrate(tiny_model(family), data, NAME)
    assert ours.keys() == stock.keys() and len(ours) >= 14
    for name, expected in stock.items():
        if ".layers.0." in name:  # later ones see what a rounding tie in layer 0 may have moved
            error = torch.linalg.norm(ours[name] - expected) / torch.linalg.norm(expected)
            assert error < 1e-5, (name, float(error))


def test_rotated_weights_are_fed_rotated_hidden_states(tiny_model):
    """Rotations come when calibration starts, and the embeddings turn with the weights."""
    found = {}
    for name in ("sequential", NAME):
        rotation = SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
        data = loader(random_sequences(LENGTHS))
        found[name] = calibrate(tiny_model("llama"), data, name, after=[rotation])
    for name, expected in found["sequential"].items():
        if ".layers.0." in name:
            error = torch.linalg.norm(found[NAME][name] - expected) / torch.linalg.norm(expected)
            assert error < 1e-5, (name, float(error))


SMOOTHERS = {
    "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=0.8),
    "awq": lambda: AWQModifier(n_grid=4),
}


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("smoother", SMOOTHERS)
def test_hessians_are_of_smoothed_inputs(tiny_model, smoother, alpha):
    """The norm's weight is divided by what the next weights' columns are multiplied by."""
    data = loader(random_sequences(LENGTHS))
    plain = calibrate(tiny_model("llama"), data, NAME, gptaq_alpha=alpha)
    model = tiny_model("llama")
    norm = decoder_layers(model)[0].input_layernorm.weight
    before = norm.detach().clone()
    after = [SMOOTHERS[smoother]()]
    smoothed = calibrate(model, data, NAME, after=after, gptaq_alpha=alpha)
    factors = before / norm.detach()
    assert factors.std() > 0.01, "nothing was smoothed"
    for part in "qkv":
        (name,) = [name for name in plain if f".layers.0.self_attn.{part}_proj" in name]
        expected = plain[name] / factors / factors[:, None]
        torch.testing.assert_close(smoothed[name], expected, rtol=1e-4, atol=1e-6)


ATTENTION = [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]
MLP = [["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"]


def test_smoothing_that_changes_the_model_is_refused(tiny_model):
    """Gemma's MLP has a norm of its own; llm-compressor's default mappings divide another one."""
    data = loader(random_sequences(LENGTHS))
    with pytest.raises(
        CalibrationError, match=r"SmoothQuantModifier changes what layer 0 computes"
    ):
        calibrate(tiny_model("gemma3_text"), data, NAME, after=[SMOOTHERS["smoothquant"]()])
    mapped = SmoothQuantModifier(smoothing_strength=0.8, mappings=[ATTENTION, MLP])
    assert calibrate(tiny_model("gemma3_text"), data, NAME, after=[mapped])


def test_without_padding_nothing_of_the_square_of_the_length_is_kept(tiny_model):
    model = tiny_model("llama")
    data = loader(random_sequences([200]))
    calls = record_batches(model, decoder_layers(model), data, (CPU, CPU), HiddenStates())
    kept = [leaf for leaf in tree_leaves(calls) if isinstance(leaf, torch.Tensor)]
    assert kept, "position embeddings at least are passed on"
    assert max(tensor.numel() for tensor in kept) < 200 * 200


def test_masks_of_a_sliding_window_are_kept_once_for_all_batches_of_a_length(tiny_model):
    model = tiny_model("gemma3_text", sliding_window=8)
    data = loader(random_sequences([40, 40, 24, 40, 24]))
    calls = record_batches(model, decoder_layers(model), data, (CPU, CPU), HiddenStates())
    kept = {id(leaf): leaf for leaf in tree_leaves(calls) if isinstance(leaf, torch.Tensor)}
    masks = [leaf for leaf in kept.values() if leaf.dtype == torch.bool]
    assert sorted(mask.shape[-1] for mask in masks) == [24, 40]
    assert len(kept) == len({id(leaf) for leaf in tree_leaves(calls[1:3]) if id(leaf) in kept})


def test_what_differs_between_batches_is_not_taken_for_the_same():
    first, second, kept = torch.ones(2, 2), torch.zeros(2, 2), {}
    moved = [move([first, second], CPU, kept), move([second, second, first], CPU, kept)]
    assert [[int(x[0, 0]) for x in each] for each in moved] == [[1, 0], [0, 0, 1]]


def test_the_last_layer_is_not_run_for_nothing(tiny_model):
    model = tiny_model("llama")
    calls = []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    calibrate(model, loader(random_sequences([16, 8])), NAME)
    assert calls == [0, 0, 0, 0, 1, 1]


def test_the_layers_are_back_in_place(tiny_model):
    model = tiny_model("llama")
    layers = decoder_layers(model)
    record_batches(model, layers, loader(random_sequences([16])), (CPU, CPU), HiddenStates())
    assert decoder_layers(model) == layers


def test_a_quantized_head_goes_through_the_sequential_pipeline_and_says_so(tiny_model):
    model, said = tiny_model("llama"), []
    named = SCHEME["config_groups"]["group_0"] | {"targets": ["Linear", "re:.*lm_head$"]}
    groups = {"group_0": named}
    handle = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    try:
        calibrate(model, loader(random_sequences([16, 8])), NAME, ignore=[], config_groups=groups)
    finally:
        logger.remove(handle)
    assert any("sequential pipeline" in message and "lm_head" in message for message in said)
    assert hasattr(model.lm_head, "weight_scale")


class Odd(torch.nn.Module):
    """Scales hidden states between its layers, which no single layer would show."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        hidden = torch.ones(*input_ids.shape, 4)
        for layer in self.layers:
            hidden = layer(hidden) * 2
        return hidden


def test_the_sequential_pipeline_keeps_its_masks_on_the_host(tiny_model, monkeypatch):
    kept_on = []

    class Sequential:
        def __call__(self, model, dataloader, dataset_args):
            kept_on.append(dataset_args.sequential_offload_device)

    monkeypatch.setattr(pipeline, "SequentialPipeline", Sequential)
    model = tiny_model("llama")
    model.lm_head.quantization_scheme = object()
    pipeline.LayerPipeline()(model, [], SimpleNamespace(sequential_offload_device="cuda"))
    assert kept_on == ["cpu"]


def test_a_model_that_works_between_its_layers_is_not_supported():
    model = Odd()
    with pytest.raises(UnsupportedModelError, match="between its decoder layers"):
        data = loader(random_sequences([8]))
        record_batches(model, list(model.layers), data, (CPU, CPU), HiddenStates())


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_a_device_reports_is_not_taken_for_a_kind_of_model(fault):
    class Faulty(Odd):
        def forward(self, input_ids, attention_mask):
            raise fault("CUDA error")

    model = Faulty()
    with pytest.raises(fault, match="CUDA error"):
        data = loader(random_sequences([8]))
        record_batches(model, list(model.layers), data, (CPU, CPU), HiddenStates())


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_a_layer_may_write_to_its_input(tiny_model, alpha):
    """What it writes to is needed again, to pass it on behind the quantized layer."""
    found = []
    for double in (lambda hidden: hidden * 2, lambda hidden: hidden.mul_(2)):
        model = tiny_model("llama")
        for layer in model.model.layers:
            layer.register_forward_pre_hook(
                lambda _, args, double=double: (double(args[0]), *args[1:])
            )
        found.append(calibrate(model, loader(random_sequences(LENGTHS)), NAME, gptaq_alpha=alpha))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 14
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_layer_that_writes_to_what_all_batches_share_is_refused(tiny_model):
    model = tiny_model("llama")

    def write(_module, _args, kwargs):
        kwargs["position_embeddings"][0].mul_(1)

    model.model.layers[1].register_forward_pre_hook(write, with_kwargs=True)
    with pytest.raises(CalibrationError, match="layer 1 writes in place to a mask or another arg"):
        calibrate(model, loader(random_sequences(LENGTHS)), NAME)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_an_input_that_changes_between_its_modules_is_refused(tiny_model, alpha):
    model = tiny_model("llama")
    calls = []

    def write(_module, args):
        calls.append(args)
        if len(calls) > 1:  # in the first batch those who share an input are found
            args[0].mul_(1)

    model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(write)
    with pytest.raises(CalibrationError, match=r"q_proj is written to in place before all modules"):
        calibrate(model, loader(random_sequences(LENGTHS)), NAME, gptaq_alpha=alpha)
