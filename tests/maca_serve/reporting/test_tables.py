"""Tables in a terminal of any width."""

import pytest
from maca_serve.reporting.speed_view import Grid
from maca_serve.reporting.tables import _parts

ROWS = [["smollm2-135m-instruct", "128", "4", "115.6", "13964", "0.40x"]]
GRID = Grid(["speed", "tokens in", "in flight", "TPOT ms", "p99", "ratio"], ROWS, keys=3)


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (80, [[0, 1, 2, 3, 4, 5]]),
        (66, [[0, 1, 2, 3, 4, 5]]),
        (65, [[0, 1, 2, 3, 4], [0, 1, 2, 5]]),
        (20, [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 5]]),
    ],
)
def test_a_grid_is_cut_between_columns_and_every_part_says_what_a_row_is(width, parts):
    assert _parts(GRID, width) == parts
