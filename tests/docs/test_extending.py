"""The worked example of docs/extending.md runs as it stands there."""

import pytest
import torch
from documents import ROOT, blocks
from tiny import WIDE, loader, random_sequences, save_tiny_model
from transformers import AutoModelForCausalLM
from watching import hessians_of

LENGTHS = [40, 24, 9]
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def example():
    """Names that the page's Python blocks define, run in order."""
    names = {"__name__": "example"}
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    """A tiny model quantized with it: the model, its inputs, first Hessian and first weight."""
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("llama"), **WIDE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = random_sequences(LENGTHS)
    module, seen = model.get_submodule(NAME), []
    keep = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    for sequence in sequences:
        with torch.no_grad():
            model(input_ids=sequence[None])
    keep.remove()
    before, found = module.weight.detach().clone(), {}
    original = example["ClippingModifier"].compress_module_list

    def watch(self, module_list):
        found.update(hessians_of(self, module_list)) if NAME not in found else None
        original(self, module_list)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example["ClippingModifier"], "compress_module_list", watch)
        example["quantize_with_it"](model, loader(sequences))
    return model, seen, found[NAME].double(), before


def test_the_weighting_is_the_one_that_it_says(run):
    _, seen, hessian, _ = run
    expected = torch.zeros_like(hessian)
    for rows in seen:
        weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.double)
        weights[:16] *= 2
        expected += rows.T @ (weights[:, None] * rows)
    torch.testing.assert_close(
        hessian / hessian.trace(), expected / expected.trace(), rtol=1e-4, atol=1e-7
    )


def test_each_scale_is_one_of_the_two(run):
    model, _, _, before = run
    scale = model.get_submodule(NAME).weight_scale.detach()
    groups = before.unflatten(1, (-1, 128))
    whole = 2 * groups.abs().amax(-1) / 15
    share = (scale / whole).flatten()
    near = [(share - expected).abs() < 0.01 for expected in (1.0, 0.9)]
    assert bool((near[0] | near[1]).all()) and all(bool(choice.any()) for choice in near)


def test_a_recipe_may_name_it(example, tmp_path):
    from maca_llmc.recipe.reading import read_recipe

    path = tmp_path / "mine.yaml"
    fields = "{scheme: W4A16, ignore: [lm_head], length_exponent: 0.5}"
    path.write_text(f"quantize_stage:\n  quantize_modifiers:\n    ClippingModifier: {fields}\n")
    (modifier,) = read_recipe(path).modifiers
    assert type(modifier).__name__ == "ClippingModifier" and modifier.length_exponent == 0.5
