"""Plans against the runs they are of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import DATA, quantize

import maca_llmc
from maca_llmc.calibrate import pipeline
from maca_llmc.common.errors import UserError
from maca_llmc.planning import ask_doctor, plan_table

ROOT = Path(__file__).parents[3]
RECIPE = "a_stage: {b_modifiers: {MaCaModifier: {%s, ignore: [lm_head]}}}"
GROUP = (
    "config_groups: {g: {targets: [Linear], weights: {num_bits: %s, strategy: group, "
    "group_size: 32, symmetric: %s}}}"
)


@pytest.fixture
def recipe(tmp_path):
    def write(fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE % fields)
        return path

    return write


@pytest.fixture(autouse=True)
def no_doctor(monkeypatch):
    """The serve environment is asked in one test of its own."""
    monkeypatch.setattr(ask_doctor, "find_doctor", lambda: None)


def planned(source, recipe, **settings):
    return maca_llmc.plan("nowhere", model=str(source), recipe=recipe, **DATA | settings)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (GROUP % (4, "true"), {}),
        (GROUP % (3, "true"), {}),
        (GROUP % (3, "true"), {"container": 4}),
        (GROUP % (4, "false"), {}),
        ("scheme: W8A8", {}),
        ("scheme: FP8", {}),
    ],
    ids=["W4", "W3", "W3 in 4", "asymmetric", "W8A8", "FP8"],
)
def test_sizes_and_hessians_are_those_of_the_run(tiny_models, tmp_path, recipe, fields, settings):
    source = tiny_models("llama", tie_word_embeddings=True)
    found = planned(source, recipe(fields), **settings)
    output = quantize(source, tmp_path / "out", recipe(fields), **settings)
    size = (output / "model.safetensors").stat().st_size
    # the file's header, and the original shape beside packed weights
    assert found["checkpoint_bytes"] == pytest.approx(size, rel=0.15)
    record = json.loads((output / "maca_run.json").read_text())
    assert found["state_bytes"] == pytest.approx(record["state_bytes"], rel=0.5)
    assert found["hessians"]["modules"] == len(record["modules"]) == 14
    assert found["hessians"]["distinct"] == 8
    assert found["calibration"] == record["calibration"]
    assert found["modules"] == [{"scheme": record["scheme"], **COUNTS}]


COUNTS = {"modules": 14, "parameters": 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)}


def test_without_any_hessian_there_is_a_plan_as_well(tiny_models, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    fields = "targets: [Linear], scheme: W8A8, ignore: [lm_head]"
    recipe.write_text(f"a_stage: {{m_modifiers: {{QuantizationModifier: {{{fields}}}}}}}")
    found = planned(tiny_models("llama"), recipe)
    assert found["hessians"] == {"modules": 0, "distinct": 0, "largest_layer_bytes": 0}
    assert found["modules"][0]["modules"] == 14 and found["memory"]["one_layer"] > 0


def test_what_stays_says_why(tiny_models, recipe):
    found = planned(tiny_models("qwen3_moe"), None)["unquantized"]
    assert [(entry["modules"], entry["first"]) for entry in found] == [
        (1, "model.embed_tokens"),
        (1, "lm_head"),
    ]
    assert "looked up" in found[0]["why"]
    assert found[1]["why"] == "'lm_head' is in the recipe's ignore list"
    only_q = GROUP.replace("[Linear]", "['re:.*q_proj']") % (4, "true")
    found = planned(tiny_models("llama"), recipe(only_q), allow_unfused=True)["unquantized"]
    assert ("no scheme of the recipe targets it", 12) in [
        (entry["why"], entry["modules"]) for entry in found
    ]


def test_experts_share_hessians(tiny_models):
    found = planned(tiny_models("qwen3_moe"), None)["hessians"]
    assert found["modules"] == 2 * (4 + 3 * 4) and found["distinct"] == 2 * (1 + 1 + 1 + 4)


def test_hidden_states_beyond_the_limit_go_to_disk(tiny_models):
    source = tiny_models("llama")
    memory = planned(source, None, cache_gb=0)["memory"]
    assert memory["spilled"] == memory["hidden_states"] > 0
    assert planned(source, None)["memory"]["spilled"] == 0


def test_the_memory_of_the_embedded_model_is_near_what_a_run_took():
    """Recorded by ``benchmarks/calibration.py`` and the demo; a run itself takes a minute."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    (entry,) = [e for e in recorded["checkpoints"] if e["name"] == "maca"]
    script = (
        "import json, maca_llmc\n"
        f"recipe = {str(ROOT / 'recipes' / 'w4a16-g64.maca.yaml')!r}\n"
        "fields = {'recipe': recipe, 'lengths': [128, 256, 512, 2048], 'tokens': 16384}\n"
        "print(json.dumps(maca_llmc.plan('nowhere', **fields)))\n"
    )
    # in a process of its own: what this one holds already counts
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["memory"]["host"] == pytest.approx(entry["quantize"]["peak_rss_bytes"], rel=0.35)
    assert found["checkpoint_bytes"] == pytest.approx(entry["size_bytes"], rel=0.05)
    assert found["hessians"] == {
        "modules": 210,
        "distinct": 120,
        "largest_layer_bytes": 4 * (3 * 576**2 + 1536**2),
    }


def test_a_plan_that_cannot_work_is_refused(tiny_models, recipe):
    with pytest.raises(UserError, match="group size 128 does not divide"):
        planned(tiny_models("llama"), recipe("scheme: W4A16"))


def test_nothing_is_written(tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned(tiny_models("llama"), None)
    assert not list(tmp_path.iterdir())


def test_the_tables_show_every_part(tiny_models, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = planned(tiny_models("llama"), None)
    found["kernels"].append(
        {
            "target": "an old card",
            "verdict": "does not load",
            "kernels": {"none": 14},
            "remarks": ["only [torch.float16] here"],
            "changes": [{"change": "store it in 4-bit containers", "kernels": ["Marlin"]}],
        }
    )
    plan_table.print_plan(found)
    shown = capsys.readouterr().out
    for text in (
        "W4A16 int, group 32, symmetric",
        "8 for 14 modules",
        "peak host memory",
        "unknown: no serve environment",
        "lm_head",
        "none (14); does not load",
        "only [torch.float16] here",
        "would help: store it in 4-bit containers: Marlin",
    ):
        assert text in shown


GPTAQ = "gptaq_alpha: 1.0, " + GROUP % (4, "true")


@pytest.mark.parametrize(
    ("family", "shape"), [("llama", {}), ("qwen3_moe", {"moe_intermediate_size": 64})]
)
def test_passes_and_what_is_kept_for_gptaq_are_those_of_the_run(
    tiny_models, tmp_path, recipe, monkeypatch, family, shape
):
    source = tiny_models(family, **shape)
    found = planned(source, recipe(GPTAQ), cache_gb=0)
    ran = []
    original = pipeline.Batches.outputs

    def outputs(self, layer, index, *rest):
        ran.append(index)
        return original(self, layer, index, *rest)

    monkeypatch.setattr(pipeline.Batches, "outputs", outputs)
    output = quantize(source, tmp_path / "out", recipe(GPTAQ), cache_gb=0)
    assert (ran.count(0), ran.count(1)) == (6, 5), "the last layer's outputs go nowhere"
    kept = json.loads((output / "maca_run.json").read_text())["spilled_bytes"]
    assert found["memory"]["spilled"] == kept
