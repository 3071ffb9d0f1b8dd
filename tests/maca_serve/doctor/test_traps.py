import pytest
from maca_serve.doctor.traps import false_yes, half_a_tile, torn_groups, torn_tiles

INT8 = "CutlassInt8ScaledMMLinearKernel"


def test_int8_on_blackwell():
    problem = false_yes(INT8, 120, "x")
    assert problem.severity == "error"
    assert "VLLM_DISABLED_KERNELS=CutlassInt8ScaledMMLinearKernel" in problem.cure


@pytest.mark.parametrize(("kernel", "capability"), [(INT8, 90), (INT8, None), ("Other", 120)])
def test_elsewhere_a_yes_is_one(kernel, capability):
    assert false_yes(kernel, capability, "x") is None


@pytest.mark.parametrize(
    ("partition", "fails"),
    [([240, 256], True), ([256, 256], False), ([240, 496], False), ([8, 256], False)],
)
def test_int8_widths_that_amx_code_cannot_pack(partition, fails):
    found = half_a_tile("CPUInt8ScaledMMLinearKernel", partition, "o_proj")
    assert (found is not None) == fails
    assert half_a_tile("CPUWNA16LinearKernel", partition, "o_proj") is None


@pytest.mark.parametrize(
    ("kernel", "partition", "fails"),
    [
        ("CPUExpertsInt4", [256, 160], False),
        ("CPUExpertsInt4", [256, 144], True),
        ("CPUExpertsInt4", [240, 128], True),
        ("CPUExpertsInt8", [256, 144], False),
    ],
)
def test_experts_in_tiles(kernel, partition, fails):
    found = torn_tiles(kernel, partition, "x")
    assert (found is not None) == fails
    if found:
        assert found.severity == "error" and found.modules == ["x"]


@pytest.mark.parametrize(
    ("kernel", "group_size", "fails"),
    [
        ("CPUExpertsInt4", 192, True),
        ("CPUExpertsInt4", 160, True),
        ("CPUExpertsInt4", 96, False),
        ("CPUExpertsInt4", 256, False),
        ("CPUExpertsInt4", None, False),
        ("CPUWNA16LinearKernel", 192, False),
    ],
)
def test_groups_of_experts(kernel, group_size, fails):
    found = torn_groups(kernel, group_size, "x")
    assert (found is not None) == fails
    if found:
        assert found.severity == "error" and "at most 128" in found.cure
