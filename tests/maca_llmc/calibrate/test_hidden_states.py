import pytest
import torch

from maca_llmc.calibrate.hidden_states import HiddenStates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("limit", [0, 250, None])
def test_what_is_put_comes_back_wherever_it_was(tmp_path, dtype, limit):
    states, expected = HiddenStates(limit, tmp_path / "spill"), {}
    for _ in range(2):  # a second layer's take the place of the first's
        for index, length in enumerate((3, 9, 5)):
            expected[index] = torch.randn(1, length, 8).to(dtype)
            states.put(index, expected[index].clone())
        for index, hidden in expected.items():
            found = states.get(index)
            assert found.dtype == dtype and torch.equal(found, hidden)


def test_no_more_is_held_than_the_limit(tmp_path):
    states = HiddenStates(100, tmp_path)
    for index in range(4):
        states.put(index, torch.ones(10))  # 40 bytes each
    assert states.spilled_bytes == 80
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden-2.bin", "hidden-3.bin"]


def test_without_a_limit_nothing_is_written(tmp_path):
    states = HiddenStates(None, tmp_path / "spill")
    states.put(0, torch.ones(1000))
    assert states.spilled_bytes == 0 and not (tmp_path / "spill").exists()
