import pytest
from maca_serve.common import ranks as module
from maca_serve.common.errors import UserError
from maca_serve.common.ranks import Ranks, check_ranks
from maca_serve.formats.checkpoint import open_checkpoint


@pytest.fixture
def doctor(monkeypatch):
    """What the doctor says; it notes the sizes that it was asked about."""
    problems, asked = [], []

    def diagnose(folder, tensor_parallel):
        asked.append(tensor_parallel)
        return {"problems": problems}

    monkeypatch.setattr(module, "diagnose", diagnose)
    return problems, asked


def test_sizes():
    assert Ranks().arguments == [] and Ranks().count == 1
    assert Ranks(2, 3).count == 6
    assert Ranks(2).arguments == ["--tensor-parallel-size", "2"]
    assert Ranks(1, 3).arguments == ["--pipeline-parallel-size", "3"]
    for sizes, option in (((0, 1), "--tp: 0"), ((1, -1), "--pp: -1")):
        with pytest.raises(UserError, match=f"{option} is not positive"):
            Ranks(*sizes)


def test_heads_and_layers_that_do_not_divide(base, doctor):
    checkpoint = open_checkpoint(base)
    with pytest.raises(UserError, match=r"--tp: 4 attention heads .* 3 .*: use .* 1, 2, 4"):
        check_ranks(checkpoint, Ranks(3))
    with pytest.raises(UserError, match="--pp: 3 ranks for the 2 layers"):
        check_ranks(checkpoint, Ranks(1, 3))
    check_ranks(checkpoint, Ranks(2, 2))
    assert doctor[1] == []


def test_the_doctor_is_asked_about_a_quantized_checkpoint(quantized, doctor):
    problems, asked = doctor
    checkpoint = open_checkpoint(quantized)
    check_ranks(checkpoint, Ranks(1, 2))
    assert asked == []
    problems.append({"severity": "warning", "what": "slow", "cure": ""})
    check_ranks(checkpoint, Ranks(2))
    problems.append({"severity": "error", "what": "groups are torn", "cure": "use group 32"})
    with pytest.raises(UserError, match=r"--tp: groups are torn; use group 32 .*doctor.* --tp 2"):
        check_ranks(checkpoint, Ranks(2))
    assert asked == [2, 2]
