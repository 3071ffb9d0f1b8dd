"""Checks of the engine's log."""

import pytest
from maca_serve.verification.checks import check_kernel, check_memory

KERNEL = "Using CPUWNA16LinearKernel for CompressedTensorsWNA16"
EXPERTS = "Using 'CPU' WNA16 MoE backend."


def layer(kernel, scheme="CompressedTensorsWNA16", quantized=True, backend=None):
    return {"kernel": kernel, "scheme": scheme, "quantized": quantized, "backend": backend}


@pytest.mark.parametrize(
    ("lines", "layers", "status"),
    [
        ([KERNEL], [layer("CPUWNA16LinearKernel"), layer(None, None, False)], "pass"),
        ([KERNEL], [layer("MarlinLinearKernel")], "fail"),
        ([KERNEL], [layer(None)], "fail"),
        ([KERNEL], [layer("CPUWNA16LinearKernel"), layer("MarlinLinearKernel")], "fail"),
        ([], [layer("MarlinLinearKernel")], "fail"),
        ([KERNEL, EXPERTS], [layer("CPUWNA16LinearKernel")], "fail"),
        ([EXPERTS], [layer("CPUExpertsInt4", backend="CPU")], "pass"),
        ([KERNEL], [layer("CPUExpertsInt4", backend="CPU")], "fail"),
        ([EXPERTS], [layer("CPUExpertsInt4", backend="ZEN_CPU")], "fail"),
        ([], [layer("OwnMethod", "OwnMethod")], "not checked"),
        ([], [], "not checked"),
        ([], None, "not checked"),
    ],
)
def test_verify_holds_the_log_to_the_doctor(lines, layers, status):
    check = check_kernel(lines, layers)
    assert check.status == status
    assert check.found


@pytest.mark.parametrize(
    ("gib", "status"), [("10.00", "pass"), ("11.05", "pass"), ("11.20", "fail"), ("8.80", "fail")]
)
def test_verify_holds_the_memory_to_the_files(gib, status):
    line = f"Model loading took {gib} GiB memory and 3.1 seconds"
    check = check_memory([line], 10 * 1024**3)
    assert check.status == status
    assert check.limit == "10.00 GiB in the files, ± 1.06 (10% and 64 MiB)"


def test_memory_that_is_not_named_is_not_checked():
    check = check_memory([KERNEL], 10)
    assert check.status == "not checked" and "CPU engine" in check.found
