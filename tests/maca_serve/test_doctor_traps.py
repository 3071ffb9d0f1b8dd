import pytest
from maca_serve.doctor.traps import false_yes

INT8 = "CutlassInt8ScaledMMLinearKernel"


def test_int8_on_blackwell():
    problem = false_yes(INT8, 120, "x")
    assert problem.severity == "error"
    assert "VLLM_DISABLED_KERNELS=CutlassInt8ScaledMMLinearKernel" in problem.cure


@pytest.mark.parametrize(("kernel", "capability"), [(INT8, 90), (INT8, None), ("Other", 120)])
def test_elsewhere_a_yes_is_one(kernel, capability):
    assert false_yes(kernel, capability, "x") is None
