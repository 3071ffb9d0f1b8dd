"""Finding, checking and loading the model to quantize."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model
from transformers import AutoProcessor

from maca_llmc.common.errors import UserError
from maca_llmc.model import loading, smollm2
from maca_llmc.model.base_weights import check_sizes, read_headers


@pytest.fixture
def copy(tiny_models, tmp_path):
    """A tiny model's folder to break."""
    return shutil.copytree(tiny_models("llama", num_hidden_layers=1), tmp_path / "model")


def test_a_folder_a_hub_name_and_the_embedded_model_resolve(copy, tmp_path, monkeypatch):
    assert loading.resolve_model(str(copy)) == str(copy)
    assert loading.resolve_model("org/name") == "org/name"
    monkeypatch.setattr(smollm2, "embedded_model", lambda: tmp_path / "embedded")
    assert loading.resolve_model(smollm2.NAME) == str(tmp_path / "embedded")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loading.resolve_model("~/model") == str(copy)


@pytest.mark.parametrize("name", ["/nowhere/model", "./a/b", "../model", "~/x", "gpt", "a/b/c"])
def test_a_folder_that_does_not_exist_is_refused(name):
    with pytest.raises(UserError, match=rf"model folder {name} does not exist: give a folder, a "):
        loading.resolve_model(name)


def test_a_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"model has no safetensors weights: .*save_pretrained"):
        loading.resolve_model(str(copy))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json: is it a Hugging Face model\?"):
        loading.resolve_model(str(tmp_path))


def test_a_hub_model_that_is_out_of_reach_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"cannot load model org/nowhere: .*hub name") as caught:
        loading.load_config("org/nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no_such_family"}', "{}"])
def test_a_broken_configuration_is_refused_in_one_line(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"cannot load model {copy}: ") as caught:
        loading.load_config(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"hidden_size": "wide"}, "cannot load model .*expected int, got str"),
        ({"hidden_act": "foo"}, "cannot make a LlamaForCausalLM of .*KeyError: 'foo'.: mend it"),
        ({"vocab_size": -1}, "cannot make a LlamaForCausalLM of .*negative dimension"),
        ({"dtype": "float8_e4m3fn"}, "is to be loaded as torch.float8_e4m3fn: write dtype bf"),
    ],
)
def test_a_wrong_number_or_name_in_a_configuration_is_one_line(copy, fields, error):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=error) as caught:
        loading.meta_model(loading.load_config(str(copy)))
    assert "\n" not in str(caught.value)


def test_a_quantized_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized already: give the unquantized one"):
        loading.load_config(str(copy))


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_a_missing_tokenizer_is_refused_in_one_line(copy, kept):
    """Transformers makes a tokenizer of a few tokens up for some families."""
    for file in copy.glob("tokenizer*"):
        if file.name not in kept:
            file.unlink()
    with pytest.raises(UserError, match=rf"model {copy} has no tokenizer \(none of ") as caught:
        loading.load_tokenizer(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "", "version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_tokenizer_file_is_named(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(UserError, match=rf"{copy / name} is damaged: download it or make it"):
        loading.load_tokenizer(str(copy))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("broken", ["cut", "pointer", "empty"])
def test_broken_weights_are_refused_in_one_line(copy, broken):
    """A download that was cut short, a git-lfs pointer, an empty file."""
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-100], "pointer": POINTER.encode(), "empty": b""}[broken])
    with pytest.raises(UserError, match=rf"{path} is cut short or damaged .*download") as caught:
        loading.resolve_model(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_a_meta_model_has_the_modules_and_shapes_of_the_loaded_one(tiny_models, family):
    source = str(tiny_models(family, num_hidden_layers=1))
    config = loading.load_config(source)
    shapes, loaded = loading.meta_model(config), loading.load_model(source, config)
    assert not loaded.training and {p.device.type for p in shapes.parameters()} == {"meta"}
    assert {name: (p.shape, p.dtype) for name, p in shapes.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in loaded.named_parameters()
    }


def test_a_model_is_loaded_in_its_own_dtype(tmp_path):
    folder = save_tiny_model("llama", tmp_path, num_hidden_layers=1)
    config = loading.load_config(str(folder))
    loading.load_model(str(folder), config).bfloat16().save_pretrained(folder)
    config = loading.load_config(str(folder))
    assert loading.load_model(str(folder), config).dtype == torch.bfloat16
    assert {p.dtype for p in loading.meta_model(config).parameters()} == {torch.bfloat16}


def test_a_multimodal_checkpoint_keeps_all_its_parts(tiny_models):
    config = loading.load_config(str(tiny_models("gemma3")))
    assert loading.model_class_of(config).__name__ == "Gemma3ForConditionalGeneration"
    assert loading.context_length(config) == 512


def test_processor_files_are_found_and_not_loaded(tiny_models, monkeypatch):
    """Loading those of Qwen-VL takes torchvision, which text has no use for."""

    def load(*_, **__):
        raise ImportError("requires the torchvision library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    files = loading.processor_files(str(tiny_models("gemma3")))
    assert [file.name for file in files] == ["preprocessor_config.json"]
    assert loading.processor_files(str(tiny_models("llama", num_hidden_layers=1))) == []


def changed(folder, change):
    """Change the tensors of a model's folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


LAST = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("name", [LAST, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused(copy, name, value):
    """Also those that are only copied."""
    source = changed(copy, lambda tensors: tensors[name].view(-1)[3:5].fill_(value))
    with pytest.raises(UserError, match=rf"2 of \d+ numbers in {name} are infinite or NaN"):
        loading.load_model(source, loading.load_config(source))


def test_weights_that_the_dtype_cannot_hold_are_refused(copy):
    source = changed(copy, lambda tensors: tensors[LAST].view(-1)[0].fill_(1e6))
    with pytest.raises(UserError, match=r"1 of .* numbers in .* are infinite or NaN as float16"):
        loading.load_model(source, loading.load_config(source), torch.float16)


QUANTIZED = {
    "float8 with scales": {LAST: torch.float8_e4m3fn, LAST + "_scale_inv": torch.float32},
    "float8 alone": {LAST: torch.float8_e5m2},
    "left-over scales": {LAST + "_scale_inv": torch.float32},
    "compressed-tensors": {LAST + "_packed": torch.int32},
    "AWQ": {LAST.replace("weight", "qweight"): torch.int32},
    "bitsandbytes": {LAST: torch.int8, LAST.replace("weight", "SCB"): torch.float32},
    "bitsandbytes 4-bit": {LAST + ".absmax": torch.float32},
    "MXFP4": {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.uint8},
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_refused_whatever_the_configuration_says(copy, kind):
    made = {name: torch.zeros(4, 4).to(dtype) for name, dtype in QUANTIZED[kind].items()}
    source = changed(copy, lambda tensors: tensors.update(made))
    with pytest.raises(UserError, match=r"is quantized .*config.json has no quant") as caught:
        loading.load_config(source)
    assert "\n" not in str(caught.value) and any(name in str(caught.value) for name in made)


def test_a_text_part_that_is_quantized_is_refused(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models("gemma3"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized already: give the unquantized one"):
        loading.load_config(str(folder))


@pytest.mark.parametrize(
    ("family", "size", "name"),
    [
        ("llama", "vocab_size", "(lm_head|model.embed_tokens).weight"),
        ("llama", "intermediate_size", "model.layers.0.mlp.down_proj.weight"),
        ("qwen3_moe", "moe_intermediate_size", "model.layers.0.mlp.experts.0.down_proj.weight"),
    ],
)
def test_sizes_that_differ_are_named(tiny_models, tmp_path, family, size, name):
    """When loading, too: there a checkpoint's names are the model's."""
    folder = shutil.copytree(tiny_models(family, num_hidden_layers=1), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config[size] += 8
    (folder / "config.json").write_text(json.dumps(config))
    source = str(folder)
    config = loading.load_config(source)
    for check in (
        lambda: check_sizes(source, read_headers(source), loading.meta_model(config)),
        lambda: loading.load_model(source, config),
    ):
        with pytest.raises(UserError, match=rf"{name} is \d+ x \d+ and config.json asks for \d+"):
            check()


def test_weights_that_are_not_there_are_not_made_up(tiny_models, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(tiny_models("llama"), source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 weights of LlamaForCausalLM, first .*1.mlp.up_proj"
    ):
        loading.load_model(str(source), loading.load_config(str(source)))


def test_a_tied_head_is_not_missing(tiny_models):
    source = str(tiny_models("llama", tie_word_embeddings=True))
    model = loading.load_model(source, loading.load_config(source))
    assert model.lm_head.weight is model.model.embed_tokens.weight
