"""What is found without weights, against what calibration finds with them."""

import pytest
from llmcompressor import oneshot
from tiny import loader, random_sequences, tiny_config
from watching import SCHEME

from maca_llmc import MaCaModifier
from maca_llmc.model import loading
from maca_llmc.planning.distinct_inputs import distinct_inputs

FAMILIES = [
    "llama",
    "qwen3",
    "gemma3_text",
    "qwen3_moe",
    "qwen2_moe",
    "hunyuan_v1_moe",
    "mixtral",
    "minimax_m2",
    "lfm2_moe",
]
"""Those whose Linears are all quantized by this test's recipe."""


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_those_of_a_calibration(tiny_model, family):
    found = []

    class Seen(MaCaModifier):
        def compress_module_list(self, module_list):
            for group in self._groups.values():
                found.append(sorted(self._module_names[member] for member in group.members))
            super().compress_module_list(module_list)

    scheme = SCHEME | {"ignore": ["lm_head", r"re:.*mlp\.gate$"]}
    model = tiny_model(family)
    oneshot(model=model, dataset=loader(random_sequences([24, 9])), recipe=Seen(**scheme))
    shapes = loading.meta_model(tiny_config(family))
    names = [name for group in found for name in group]
    assert sorted(map(sorted, distinct_inputs(shapes, names))) == sorted(found)
