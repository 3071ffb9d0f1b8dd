"""Which way of adding ``X^T X`` to a Hessian is fastest on this machine, among the exact ones.

    .venv/bin/python benchmarks/hessian_products.py   # writes results/hessian_products.json

Exact means: products of the inputs as they are, summed in float32. Every way is checked against
float64 first. Speeds are useful FLOP/s: a triangle is counted once, ``tokens * width * (width +
1)``, whatever a way computes beyond it. The yardstick is the best square product in bfloat16.
"""

import json
import time
from pathlib import Path

import torch
from tables import markdown

from maca_llmc.common import record

RESULT = Path(__file__).parent / "results" / "hessian_products.json"
THREADS = 2
REPEATS = 7
SHAPES = [(2048, 576), (2048, 1536), (2048, 2048), (2048, 4096), (128, 1536), (8192, 1536)]


def bfloat16_precision(function):
    """Run with oneDNN allowed to multiply float32 copies of bfloat16 numbers in bfloat16."""

    def run(hessian, rows):
        settings = torch.backends.mkldnn.matmul
        before, settings.fp32_precision = settings.fp32_precision, "bf16"
        try:
            function(hessian, rows)
        finally:
            settings.fp32_precision = before

    return run


def whole(hessian, rows):
    """One float32 product."""
    rows = rows.float()
    hessian.addmm_(rows.t(), rows)


def whole_transposed(hessian, rows):
    """One float32 product, the left factor laid out as it is read."""
    rows = rows.float()
    hessian.addmm_(rows.t().contiguous(), rows)


def triangle(block):
    """The lower triangle in blocks of columns."""

    def run(hessian, rows):
        rows = rows.float()
        for start in range(0, hessian.shape[0], block):
            stop = start + block
            hessian[start:, start:stop].addmm_(rows[:, start:].t(), rows[:, start:stop])

    return run


def triangle_transposed(block):
    """The lower triangle in blocks of columns, the left factor laid out as it is read."""

    def run(hessian, rows):
        rows = rows.float()
        left = rows.t().contiguous()
        for start in range(0, hessian.shape[0], block):
            stop = start + block
            hessian[start:, start:stop].addmm_(left[start:], rows[:, start:stop])

    return run


WAYS = {
    "float32": whole,
    "float32, transposed copy": whole_transposed,
    "float32, triangle of 512": triangle(512),
    "bfloat16 units": bfloat16_precision(whole),
    "bfloat16 units, transposed copy": bfloat16_precision(whole_transposed),
    **{
        f"bfloat16 units, triangle of {block}": bfloat16_precision(triangle(block))
        for block in (256, 512, 1024)
    },
    "bfloat16 units, triangle of 512, transposed copy": bfloat16_precision(
        triangle_transposed(512)
    ),
}


def seconds(function) -> float:
    """The least of several runs, after one to warm up."""
    function()
    least = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        least = min(least, time.perf_counter() - start)
    return least


def error(way, rows) -> float:
    """Relative error of the lower triangle against float64."""
    hessian = torch.zeros(rows.shape[1], rows.shape[1])
    way(hessian, rows)
    expected = rows.double().T @ rows.double()
    return float((hessian.tril() - expected.tril()).norm() / expected.tril().norm())


def measure() -> dict:
    """GFLOP/s and error of each way at each shape, and of the yardstick."""
    square = torch.randn(2048, 2048).bfloat16()
    best = 2 * 2048**3 / seconds(lambda: square @ square) / 1e9
    shapes = []
    for tokens, width in SHAPES:
        rows = torch.randn(tokens, width).bfloat16()
        hessian = torch.zeros(width, width)
        useful = tokens * width * (width + 1)
        ways = {
            name: {
                "gflops": useful / seconds(lambda way=way, h=hessian, x=rows: way(h, x)) / 1e9,
                "error": error(way, rows),
            }
            for name, way in WAYS.items()
        }
        shapes.append({"tokens": tokens, "width": width, "ways": ways})
    return {"best_square_bfloat16_gflops": best, "shapes": shapes}


def main() -> None:
    """Print a table in Markdown and write the result file."""
    torch.set_num_threads(THREADS)
    result = {"machine": record.machine(), "versions": record.versions(), **measure()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    heads = [f"{shape['tokens']} x {shape['width']}" for shape in result["shapes"]]
    lines = [["useful GFLOP/s", *heads, "largest error"]]
    for name in WAYS:
        found = [shape["ways"][name] for shape in result["shapes"]]
        lines.append(
            [
                name,
                *(f"{way['gflops']:.0f}" for way in found),
                f"{max(way['error'] for way in found):.1e}",
            ]
        )
    lines.append(["bfloat16 2048 square", f"{result['best_square_bfloat16_gflops']:.0f}"])
    print(markdown(lines))


if __name__ == "__main__":
    main()
