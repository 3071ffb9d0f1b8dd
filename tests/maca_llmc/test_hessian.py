import pytest
import torch

from maca_llmc.hessian import add_rows, fill_dead_columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_add_up_to_the_weighted_sum(dtype):
    generator = torch.Generator().manual_seed(0)
    hessian = torch.zeros(16, 16)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    for length, weight in ((5, 1.0), (40, 0.125), (1, 3.7)):
        rows = torch.randn(length, 16, generator=generator).to(dtype)
        add_rows(hessian, rows, weight)
        for row in rows.double():
            expected += 2 * weight * torch.outer(row, row)
    assert torch.linalg.norm(hessian - expected) < 1e-6 * torch.linalg.norm(expected)


def test_dead_columns_do_not_move_the_mean_whatever_the_scale():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 8, generator=generator)
    rows[:, [2, 5]] = 0
    for factor in (1e-6, 1.0, 1e6):
        hessian = torch.zeros(8, 8)
        add_rows(hessian, rows, factor)
        live = hessian.diagonal()[hessian.diagonal() > 0].mean()
        assert fill_dead_columns(hessian) == 2
        assert hessian.diagonal().mean() == pytest.approx(float(live), rel=1e-6)
        assert hessian[2].count_nonzero() == 1


def test_a_hessian_that_saw_nothing_becomes_the_identity():
    hessian = torch.zeros(4, 4)
    assert fill_dead_columns(hessian) == 4
    assert torch.equal(hessian, torch.eye(4))


def test_a_live_hessian_is_left_alone():
    hessian = torch.eye(4) * 3
    assert fill_dead_columns(hessian) == 0
    assert torch.equal(hessian, torch.eye(4) * 3)
