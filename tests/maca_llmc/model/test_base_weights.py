"""What the files of a base model say before they are loaded, and what a checkpoint lacks."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from tiny import random_text
from transformers import AutoModelForCausalLM

from maca_llmc import quantize
from maca_llmc.common.errors import UserError
from maca_llmc.common.record import RECORD_FILE
from maca_llmc.evaluation.divergence import load_dequantized
from maca_llmc.model import base_weights, loading
from maca_llmc.model.base_weights import branches, draft_layers, read_headers, weight_files
from maca_llmc.planning import plans


@pytest.fixture
def base(tiny_models, tmp_path):
    """A tiny model of a family, with tensors and fields of the configuration added."""

    def make(family, tensors=(), **fields):
        folder = shutil.copytree(tiny_models(family), tmp_path / "base")
        here = load_file(folder / "model.safetensors")
        made = {name: torch.ones(4, 4) for name in tensors}
        save_file(here | made, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def logged():
    """What is logged from now on."""
    lines = []
    handle = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(handle)


def test_files_are_those_of_the_usual_names(tmp_path):
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor .*index.json: save"):
        weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "2.safetensors", "a": "1.safetensors"}}))
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(UserError, match=r"lacks 2.safetensors, which its index names"):
        weight_files(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert [path.name for path in weight_files(tmp_path)] == ["1.safetensors", "2.safetensors"]
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index.json is damaged: download it or make it again"):
        weight_files(tmp_path)


def test_a_hub_model_that_is_not_here_has_no_headers_yet():
    assert read_headers("org/nowhere") == {}


def config(layers=2, **fields):
    found = SimpleNamespace(num_hidden_layers=layers, **fields)
    found.get_text_config = lambda: found
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"], {"mtp": 2}),
        (["model.layers.2.eh_proj.weight"], {"model.layers.2": 1}),
        (["model.mtp_layers.0.a.weight", "model.mtp.b.weight"], None),
        (["model.vision_tower.encoder.layers.7.mlp.fc1.weight"], {}),
        (["model.layers.1.mlp.down_proj.weight"], {}),
    ],
)
def test_draft_layers_are_known_by_name_and_by_number(names, expected):
    names = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", *names]
    expected = {"model.mtp_layers": 1, "model.mtp": 1} if expected is None else expected
    assert draft_layers(names, config()) == expected
    kept = draft_layers(names, config(mtp_num_hidden_layers=1))
    assert kept == {name: count for name, count in expected.items() if name != "mtp"}


def test_branches_are_as_short_as_what_is_kept_allows():
    kept = ["a.b.0.weight", "a.c"]
    assert branches(["a.b.1.x.weight", "a.b.1.y", "d.e", "a.f"], kept) == {
        "a.b.1": 2,
        "d": 1,
        "a.f": 1,
    }


def run(folder, output):
    return quantize(output, model=folder, data=random_text(16), lengths=[16, 32], tokens=256)


DRAFTS = [
    ("qwen3_next", ["mtp.fc.weight", "mtp.norm.weight"], {}, {"mtp": 2}),
    (
        "deepseek_v3",
        ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.gate.weight"],
        {"num_nextn_predict_layers": 1},
        {"model.layers.2": 2},
    ),
]


@pytest.mark.parametrize(("family", "tensors", "fields", "lost"), DRAFTS)
def test_draft_layers_that_are_lost_are_named(
    base, tmp_path, logged, family, tensors, fields, lost
):
    folder = base(family, tensors, **fields)
    output = run(folder, tmp_path / "out")
    assert json.loads((output / RECORD_FILE).read_text())["dropped"] == lost
    written = json.loads((output / "config.json").read_text())
    assert not any(written.get(key) for key in base_weights.DRAFT_COUNTS)
    for name, count in lost.items():
        assert sum(f"has no {name} ({count} tensors" in line for line in logged) == 1


def test_a_plan_names_draft_layers(base, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "ask_kernels", lambda run: [])
    folder = base("qwen3_next", ["mtp.fc.weight"])
    options = {"data": random_text(16), "lengths": [16, 32], "tokens": 256}
    found = plans.plan(tmp_path / "out", model=folder, **options)
    assert found["dropped"] == {"mtp": 1}


def test_other_parts_that_are_lost_are_named(base, tmp_path, logged):
    output = run(base("llama", ["model.visual.patch.weight"]), tmp_path / "out")
    assert json.loads((output / RECORD_FILE).read_text())["dropped"] == {"model.visual": 1}
    assert any("has no model.visual (1 tensors" in line for line in logged)


@pytest.mark.parametrize("family", ["lfm2_moe", "mixtral", "phimoe", "minimax_m2", "qwen2_moe"])
def test_experts_are_saved_under_the_base_names(tiny_models, tmp_path, family):
    folder = tiny_models(family)
    output = run(folder, tmp_path / "out")
    modules = [
        {name.rpartition(".")[0] for name in read_headers(str(place))} for place in (folder, output)
    ]
    assert modules[0] == modules[1]


MOES = ["lfm2_moe", "mixtral", "phimoe", "qwen2_moe", "hunyuan_v1_moe", "llama4_text", "jamba"]


@pytest.mark.parametrize("family", MOES)
def test_separate_experts_compute_what_the_base_does(tiny_models, family):
    source = str(tiny_models(family))
    separate = loading.load_model(source, loading.load_config(source))
    fused = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.arange(20, 60).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(separate(ids).logits, fused(ids).logits)


def test_experts_of_sizes_that_nobody_knows_are_refused(base):
    """HunYuan has a list of them."""
    for sizes in ([32, 32], 32):
        folder = base("hunyuan_v1_moe", moe_intermediate_size=sizes)
        config = loading.load_config(str(folder))
        with pytest.raises(
            UserError, match=r"not know the sizes of HunYuanMoEV1Experts \(together"
        ):
            loading.meta_model(config)
        shutil.rmtree(folder)


def test_llama4_runs(tiny_models, tmp_path):
    output = run(tiny_models("llama4_text"), tmp_path / "out")
    experts = [n for n in read_headers(str(output)) if ".experts." in n and "packed" in n]
    assert len(experts) == 2 * 4 * 3


def test_linears_that_are_spelled_otherwise_are_written_as_codes(tiny_models, tmp_path):
    """Falcon's are of a class of its own, which compressed-tensors does not compress."""
    output = run(tiny_models("falcon"), tmp_path / "out")
    written = read_headers(str(output))
    assert sum(name.endswith("weight_packed") for name in written) == 2 * 4


@pytest.mark.parametrize("family", ["falcon", "mixtral", "lfm2_moe", "llama4_text"])
def test_what_was_written_is_read_for_an_evaluation(tiny_models, tmp_path, family):
    folder = tiny_models(family)
    read = load_dequantized(str(run(folder, tmp_path / "out")), torch.device("cpu"))
    base = load_dequantized(str(folder), torch.device("cpu"))
    ids = torch.arange(20, 60).unsqueeze(0)
    with torch.no_grad():
        found, expected = read(ids).logits.float(), base(ids).logits.float()
    assert 0 < torch.linalg.norm(found - expected) / torch.linalg.norm(expected) < 0.3


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values_run(tiny_models, tmp_path, family, monkeypatch):
    """As in the model itself, and Linears outside the layers stay as they are."""
    folder = tiny_models(family, num_hidden_layers=4)
    output = run(folder, tmp_path / "out")
    assert "model.per_layer_model_projection.weight" in read_headers(str(output))
    # vLLM calls it model.self_decoder.per_layer_model_projection in Gemma 3n
    written = json.loads((output / "config.json").read_text())["quantization_config"]
    ends = [entry for entry in written["ignore"] if entry.startswith("re:")]
    assert r"re:(.*\.)?per_layer_model_projection$" in ends
    assert len(ends) == (3 if family == "gemma3n_text" else 1)
    monkeypatch.setattr(plans, "ask_kernels", lambda run: [])
    options = {"data": random_text(16), "lengths": [16, 32], "tokens": 256}
    assert plans.plan(tmp_path / "plan", model=folder, **options)["hessians"]["distinct"] > 0


def test_draft_layers_that_are_copied_are_checked_and_kept_in_the_configuration(base):
    folder = base("qwen3_next", ["mtp.fc.weight"], mtp_num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of 16 numbers in mtp.fc.weight are infinite or NaN"):
        loading.load_model(str(folder), loading.load_config(str(folder)))
