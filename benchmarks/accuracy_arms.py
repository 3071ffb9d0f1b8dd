"""What the accuracy grid is made of: models' schemes, calibration methods, and where cells go."""

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TOKENS = 16_384
WINDOWS = 12


@dataclass(frozen=True)
class Judging:
    """Input lengths that cells are judged at, tokens scored in each window, and where cells go."""

    cells: Path
    lengths: tuple[int, ...]
    targets: int


MAIN = Judging(HERE / "results" / "accuracy.jsonl", (128, 512, 2048), 96)
CONTEXTS = Judging(HERE / "results" / "accuracy_contexts.jsonl", (64, 256, 1024, 4096), 32)
"""Inputs shorter and longer than any other; fewer targets, which have to fit into 64 tokens."""

LENGTHS, TARGETS = MAIN.lengths, MAIN.targets
MIXED = (128, 256, 512, 1024, 2048)
SHORT = (32, 64, 128, 256, 512)

SCHEMES = {
    "w3-g32": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
    "w3-g64": {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": True},
    "w4-g64": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True},
}
OBSERVED = {"hessian_scales": False, "first_token_weight": 1.0}
GPTQ = {"length_exponent": 0.0, **OBSERVED}
SEARCHED = {"hessian_scales": True, "first_token_weight": 1.0}
SINK = "first_token_weight"
ROTATED = {"rotations": ["R1", "R2"]}
METHODS = {
    # name: the modifier's fields, and the calibration data
    **{f"gptq-{length}": (GPTQ, {"scales": (length,)}) for length in (128, 512, 2048)},
    **{
        f"mixed-p{exponent:g}": ({"length_exponent": exponent, **OBSERVED}, {"scales": MIXED})
        for exponent in (0.0, 0.5, 0.8, 1.0)
    },
    "mixed-counts-p1": (OBSERVED, {"scales": MIXED, "balance": "counts"}),
    **{
        f"documents-p{exponent:g}": (
            {"length_exponent": exponent, **OBSERVED},
            {"scales": (2048,), "whole_documents": True},
        )
        for exponent in (0.0, 1.0)
    },
    "nested-p1": ({"nested_scales": [128, 256, 512, 1024], **OBSERVED}, {"scales": (2048,)}),
    **{
        f"gptq-2048-first{weight:g}": ({**GPTQ, SINK: weight}, {"scales": (2048,)})
        for weight in (4.0, 16.0, 64.0)
    },
    "gptq-128-first0.0625": ({**GPTQ, SINK: 1 / 16}, {"scales": (128,)}),
    "gptaq-2048": ({**GPTQ, "gptaq_alpha": 1.0}, {"scales": (2048,)}),
    "mse-gptq-2048": ({**GPTQ, "observer": "memoryless_mse"}, {"scales": (2048,)}),
    # with scales searched under the Hessian
    **{
        f"hs2-gptq-{length}": ({**GPTQ, **SEARCHED}, {"scales": (length,)})
        for length in (128, 512, 2048)
    },
    "hs2-mixed-p1": (SEARCHED, {"scales": MIXED}),
    "hs2-mixed-p1-damp0.001": ({**SEARCHED, "dampening_frac": 0.001}, {"scales": MIXED}),
    **{
        f"hs2-mixed-p1-first{weight:g}": ({**SEARCHED, SINK: weight}, {"scales": MIXED})
        for weight in (4.0, 16.0, 64.0)
    },
    "hs2-mixed-p0-first4": ({**GPTQ, **SEARCHED, SINK: 4.0}, {"scales": MIXED}),
    "hs2-mixed-p1-first4-damp0.001": (
        {**SEARCHED, SINK: 4.0, "dampening_frac": 0.001},
        {"scales": MIXED},
    ),
    "hs2-short-p1": (SEARCHED, {"scales": SHORT}),
    "hs2-512-first16": ({**GPTQ, **SEARCHED, SINK: 16.0}, {"scales": (512,)}),
    "hs2-2048-first64": ({**GPTQ, **SEARCHED, SINK: 64.0}, {"scales": (2048,)}),
    "hs2-128-damp0.001": ({**GPTQ, **SEARCHED, "dampening_frac": 0.001}, {"scales": (128,)}),
    # and with GPTAQ
    **{
        f"hs2-gptaq{prefix}-128-damp0.001": (
            {**GPTQ, **SEARCHED, "dampening_frac": 0.001, "gptaq_alpha": alpha},
            {"scales": (128,)},
        )
        for prefix, alpha in (("0.25", 0.25), ("", 1.0))
    },
    "hs2-gptaq0.25-mixed-p1-first4": (
        {**SEARCHED, SINK: 4.0, "gptaq_alpha": 0.25},
        {"scales": MIXED},
    ),
    # on weights that SpinQuant has rotated before, which costs nothing when they are served
    "spin-gptq-2048": ({**GPTQ, **ROTATED}, {"scales": (2048,)}),
    "spin-hs2-mixed-p1-first4": ({**SEARCHED, SINK: 4.0, **ROTATED}, {"scales": MIXED}),
}
DEFAULT = "hs2-mixed-p1-first4"
"""What ``maca-llmc quantize`` does when it is not told otherwise."""

EARLIER = {
    name.replace("hs2-", "hs-"): method for name, method in METHODS.items() if "hs2-" in name
}
"""Scales searched by what errors of columns cost one by one, as up to commit aad8173: cells that
stay for comparison and cannot be run any more."""

FORMER = "hs-mixed-p1-first4"
"""The default until then: shown where the present one was not measured."""

BASELINES = ("gptq-512", "gptq-2048", "gptq-128")

EFFECTS = (
    # what is changed, from, to
    ("several lengths, tokens alike", "gptq-2048", "mixed-p0"),
    ("each sequence one sample (MaCa as we read it)", "mixed-p0", "mixed-p1"),
    ("half of that (p = 1/2)", "mixed-p0", "mixed-p0.5"),
    ("as GPTQModel weighs lengths (p = 0.8)", "mixed-p0", "mixed-p0.8"),
    ("both of these", "gptq-2048", "mixed-p1"),
    ("each sequence one sample, first token x 4", "hs-mixed-p0-first4", "hs-mixed-p1-first4"),
    ("equally many windows of each length, not tokens", "mixed-p1", "mixed-counts-p1"),
    ("whole documents instead of windows", "mixed-p1", "documents-p1"),
    ("each sequence one sample, whole documents", "documents-p0", "documents-p1"),
    ("short sequences, tokens alike", "gptq-2048", "gptq-512"),
    ("shorter ones", "gptq-2048", "gptq-128"),
    ("nested prefixes", "gptq-2048", "nested-p1"),
    ("scales by mean squared error", "gptq-2048", "mse-gptq-2048"),
    ("scales by Hessian", "gptq-2048", "hs-gptq-2048"),
    ("scales by Hessian", "gptq-128", "hs-gptq-128"),
    ("scales by Hessian", "mixed-p1", "hs-mixed-p1"),
    ("scales by Hessian", "gptq-2048", "hs2-gptq-2048"),
    ("scales by Hessian", "gptq-512", "hs2-gptq-512"),
    ("scales by Hessian", "gptq-128", "hs2-gptq-128"),
    ("the default's lengths and weights", "hs2-gptq-2048", "hs2-mixed-p1-first4"),
    ("the default's lengths and weights", "hs2-gptq-512", "hs2-mixed-p1-first4"),
    ("the default's lengths and weights", "hs2-gptq-128", "hs2-mixed-p1-first4"),
    ("first token x 4, several lengths", "hs-mixed-p1", "hs-mixed-p1-first4"),
    ("first token x 16, not x 4", "hs-mixed-p1-first4", "hs-mixed-p1-first16"),
    ("first token x 64, not x 4", "hs-mixed-p1-first4", "hs-mixed-p1-first64"),
    ("what shrinks together counts", "hs-mixed-p1-first4", "hs2-mixed-p1-first4"),
    ("what shrinks together counts", "hs-mixed-p1-first16", "hs2-mixed-p1-first16"),
    ("first token x 16, not x 4", "hs2-mixed-p1-first4", "hs2-mixed-p1-first16"),
    ("first token x 16, length 2048", "gptq-2048", "gptq-2048-first16"),
    ("first token x 64, length 2048", "gptq-2048", "gptq-2048-first64"),
    ("first token x 64, length 2048", "hs-gptq-2048", "hs-2048-first64"),
    ("first token x 1/16, length 128", "gptq-128", "gptq-128-first0.0625"),
    ("dampening 0.001", "hs-mixed-p1", "hs-mixed-p1-damp0.001"),
    ("dampening 0.001", "hs-gptq-128", "hs-128-damp0.001"),
    ("rotated before", "gptq-2048", "spin-gptq-2048"),
    ("rotated before", "hs2-mixed-p1-first4", "spin-hs2-mixed-p1-first4"),
    ("GPTAQ, alpha 1/4", "hs2-mixed-p1-first4", "hs2-gptaq0.25-mixed-p1-first4"),
    ("GPTAQ, alpha 1/4", "hs-128-damp0.001", "hs-gptaq0.25-128-damp0.001"),
    ("GPTAQ, alpha 1", "hs-128-damp0.001", "hs-gptaq-128-damp0.001"),
)

KEY = ("model", "scheme", "method", "seed")


def read_cells(judging: Judging = MAIN) -> list[dict]:
    """All cells so far; one that was run again, to be asked questions, with its answers.

    Its divergences stay those of its first run, which was made beside those it is compared with:
    another processor moves a cell by more than many a method does.
    """
    cells: dict[tuple, dict] = {}
    for cell in read_runs(judging):
        answers = {name: cell.get(name) for name in ("tasks", "base_tasks")}
        cells[identity(cell)] = {**cells.get(identity(cell), cell), **answers}
    return list(cells.values())


def read_runs(judging: Judging = MAIN) -> list[dict]:
    """Every run of a cell, in order."""
    if not judging.cells.exists():
        return []
    return [json.loads(line) for line in judging.cells.read_text().splitlines()]


def identity(cell: dict) -> tuple:
    """What a cell is of."""
    return tuple(cell[key] for key in KEY)
