import pytest
import torch

from maca_llmc.gptq import hessian as hessian_module
from maca_llmc.gptq.hessian import WeightedHessian, add_rows, fill_dead_columns, mirror


@pytest.mark.parametrize("width", [16, 1100], ids=["one block", "three blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_add_up_to_the_weighted_sum(dtype, width):
    generator = torch.Generator().manual_seed(0)
    hessian = torch.zeros(width, width)
    expected = torch.zeros(width, width, dtype=torch.float64)
    for length, weight in ((5, 1.0), (40, 0.125), (1, 3.7)):
        rows = torch.randn(length, width, generator=generator).to(dtype)
        add_rows(hessian, rows, weight)
        expected += 2 * weight * rows.double().T @ rows.double()
    mirror(hessian)
    assert torch.linalg.norm(hessian - expected) < 1e-6 * torch.linalg.norm(expected)
    assert torch.allclose(hessian, hessian.T, rtol=1e-5, atol=1e-6)


def test_more_rows_than_are_held_at_once(monkeypatch):
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(hessian_module, "ROWS_AT_ONCE", 16)
    hessian = torch.zeros(8, 8)
    add_rows(hessian, rows, 0.5)
    assert torch.allclose(hessian, rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_short_runs_wait_for_others_of_their_weight(monkeypatch):
    products = []
    original = hessian_module.add_rows
    monkeypatch.setattr(
        hessian_module,
        "add_rows",
        lambda hessian, rows, weight: (
            products.append((len(rows), weight)),
            original(hessian, rows, weight),
        ),
    )
    monkeypatch.setattr(hessian_module, "ROWS_AT_ONCE", 64)
    generator = torch.Generator().manual_seed(0)
    whole, expected = WeightedHessian(torch.zeros(8, 8)), torch.zeros(8, 8, dtype=torch.float64)
    for length, weight in ((30, 1.0), (1, 16.0), (40, 1.0), (600, 0.5), (3, 1.0), (2, 16.0)):
        rows = torch.randn(length, 8, generator=generator)
        whole.add(rows, weight)
        expected += 2 * weight * rows.double().T @ rows.double()
        rows.zero_()  # what waits does not depend on what becomes of it
    assert products == [(70, 1.0), (600, 0.5)]
    copied = whole.copy()
    for one in (whole, copied):
        one.settle()
        mirror(one.hessian)
        assert torch.linalg.norm(one.hessian - expected) < 1e-6 * torch.linalg.norm(expected)
    assert products[2:4] == [(3, 16.0), (3, 1.0)]


def test_rows_of_many_weights_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(hessian_module, "WAITING", 100)
    whole = WeightedHessian(torch.zeros(4, 4))
    for number in range(1, 40):
        whole.add(torch.ones(10, 4), 1 / number)
        waiting = sum(len(part) for parts in whole._waiting.values() for part in parts)
        assert waiting < 100
    whole.settle()
    expected = 20 * sum(1 / number for number in range(1, 40))
    assert torch.allclose(whole.hessian, torch.full((4, 4), expected), rtol=1e-5)


def test_the_precision_of_products_is_put_back():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    add_rows(torch.zeros(4, 4), torch.ones(2, 4, dtype=torch.bfloat16), 1.0)
    assert settings.fp32_precision == before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_add_up_on_cuda(dtype):
    generator = torch.Generator().manual_seed(0)
    hessian = torch.zeros(2100, 2100, device="cuda")
    rows = torch.randn(500, 2100, generator=generator).to(dtype)
    add_rows(hessian, rows.cuda(), 0.125)
    mirror(hessian)
    expected = 0.25 * rows.double().T @ rows.double()
    assert torch.linalg.norm(hessian.cpu() - expected) < 1e-6 * torch.linalg.norm(expected)


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
