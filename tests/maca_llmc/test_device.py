"""Devices by name."""

import pytest
import torch

from maca_llmc.device import resolve_device
from maca_llmc.errors import UserError


def devices(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_a_name_is_resolved(monkeypatch, name, count, expected):
    devices(monkeypatch, count)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, count):
    devices(monkeypatch, count)
    match = rf"device '{name}' is not there \({count} CUDA devices\): give --device cpu"
    with pytest.raises(UserError, match=match):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cpu:1", "auto:0", "cuda:one", "cuda:-1", "CUDA"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UserError, match=rf"device '{name}': give auto, cpu, cuda or cuda:N"):
        resolve_device(name)
