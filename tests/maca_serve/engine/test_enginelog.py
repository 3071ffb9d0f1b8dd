import pytest
from maca_serve.engine.enginelog import (
    find_cache,
    find_cause,
    find_dtype,
    find_experts,
    find_kernels,
    find_weights_memory,
    last_message,
    tail,
)

WORKER = "(Worker pid=6948) INFO 11-22 00:28:05 [__init__.py:846] "
CORE = "(EngineCore pid=8) ERROR 11-22 00:28:05 [core.py:1] "


@pytest.mark.parametrize(
    ("line", "kernels"),
    [
        (
            "Selected CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8",
            ["CPUInt8ScaledMMLinearKernel"],
        ),
        ("Using MarlinLinearKernel for CompressedTensorsWNA16", ["MarlinLinearKernel"]),
        ("Using CPUWNA16LinearKernel for mixed-precision linear", ["CPUWNA16LinearKernel"]),
        ("Using HummingLinearKernel for AutoGPTQLinearMethod", ["HummingLinearKernel"]),
        ("Using CutlassNvFp4 for NVFP4 GEMM", ["CutlassNvFp4"]),
        ("Using max model len 8192", []),
        ("Using CPU_ATTN for attention.", []),
        ("Using LBHNC KV cache layout.", []),
    ],
)
def test_kernels(line, kernels):
    assert find_kernels([WORKER + line]) == kernels


def test_a_kernel_is_named_once():
    lines = [WORKER + f"Using {k} for CompressedTensorsWNA16" for k in ("A", "B", "A")]
    assert find_kernels(lines) == ["A", "B"]


def test_backends_of_experts():
    lines = [
        WORKER + "Using 'CPU' WNA16 MoE backend.",
        WORKER + "Using MoEPrepareAndFinalizeNoDPEPModular",
        WORKER + "Using CPUExpertsInt4",
        WORKER + "Using X86CPUUnquantizedExperts MoE backend",
        WORKER + "Using TRITON Unquantized MoE backend out of potential backends: ['TRITON'].",
        WORKER + "Using CPU_W8A8 Fp8 MoE backend out of potential backends: ['CPU_W8A8'].",
        WORKER + "Using CPU W4A8 Int8 MoE backend out of potential backends: ['CPU'].",
    ]
    assert find_experts(lines) == ["CPU experts", "CPU_W8A8 experts"]


def test_the_memory_that_the_weights_take():
    line = WORKER + "Model loading took 5.25 GiB memory and 3.112345 seconds"
    assert find_weights_memory(["other", line]) == 5.25 * 1024**3
    assert find_weights_memory([WORKER + "Checkpoint size: 0.11 GiB."]) is None


def test_the_dtype_is_the_engines():
    line = (
        "Initializing a V1 LLM engine (v0.32.0) with config: model='m', dtype=torch.float16, seed=0"
    )
    assert find_dtype(["dtype=torch.float32", WORKER + line]) == "float16"
    assert find_dtype(["dtype=torch.float32"]) is None


def test_the_first_hand_cause_is_found():
    lines = [
        WORKER + "Starting to load model",
        CORE + "Traceback (most recent call last):",
        CORE + "ValueError: Failed to find a kernel that can implement the WNA16 layer. Reasons: ",
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert find_cause(lines) == (
        "ValueError: Failed to find a kernel that can implement the WNA16 layer. Reasons:"
    )


def test_a_compiler_that_fails_says_why():
    lines = [
        WORKER + "Starting to load model",
        "/tmp/tmp1/driver.c:6:10: fatal error: Python.h: No such file or directory",
        CORE + "subprocess.CalledProcessError: Command '['/usr/bin/gcc']' returned 1",
    ]
    said = "'Python.h: No such file or directory'"
    assert find_cause(lines) == f"CalledProcessError: the compiler said {said}"
    other = CORE + "ValueError: something else"
    assert find_cause([*lines[:2], other]) == "ValueError: something else"


def test_a_killed_worker_is_the_cause_of_what_follows():
    lines = [
        CORE + "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down.",
        CORE + "RuntimeError: cancelled",
    ]
    assert find_cause(lines) == "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"


def test_an_engine_that_is_gone_is_a_cause_only_where_no_error_is_named():
    # What stands in vLLM 0.32's log after `kill -9` of its EngineCore process.
    gone = [
        "(APIServer pid=1) WARNING 11-23 13:31:39 [core_client.py:817] [shutdown] MPClient:"
        " engine core exited unexpectedly; starting cleanup",
        "(APIServer pid=1) ERROR 11-23 13:31:39 [async_llm.py:906]"
        " vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
    ]
    reset = "(APIServer pid=1) ConnectionResetError: [Errno 104] Connection reset by peer"
    assert find_cause([reset, *gone]).startswith("engine core exited unexpectedly and named no")
    assert find_cause([*gone, CORE + "MemoryError: no room"]) == "MemoryError: no room"


def test_a_broken_connection_is_a_cause_only_where_nothing_else_is_named():
    reset = CORE + "ConnectionResetError: [Errno 104] Connection reset by peer"
    assert find_cause([reset, CORE + "MemoryError: no room"]) == "MemoryError: no room"
    assert find_cause([reset, CORE + "BrokenPipeError: x"]) == (
        "ConnectionResetError: [Errno 104] Connection reset by peer"
    )


def test_memory_of_the_cache():
    tokens = CORE + "%s KV cache size: 46,592 tokens, Maximum concurrency for 8,192 tokens: 5.69x"
    cpu = [WORKER + "Explicitly set (1.5/23.54) GiB for KV cache on node 0.", tokens % "CPU"]
    cuda = [WORKER + "Available KV cache memory: 60.25 GiB", tokens % "GPU"]
    assert find_cache(cpu) == (1.5 * 1024**3, 46592)
    assert find_cache(cuda) == (60.25 * 1024**3, 46592)
    assert find_cache([WORKER + "Starting to load model"]) == (None, None)


def test_a_flag_that_vllm_does_not_know_is_a_cause():
    lines = [
        "usage: vllm serve [model_tag] [options]",
        "vllm serve: error: argument --seed: no int",
    ]
    assert find_cause(lines) == "argument --seed: no int"


def test_tail_is_what_it_said_last():
    farewell = ["/x/resource_tracker.py:254: UserWarning: leaked", "  warnings.warn('leaked')", ""]
    assert tail(["a", "b", "c", "d" * 1000, *farewell], 3) == ["b", "c", "d" * 300]


def test_pydantic_names_the_error_on_the_next_lines():
    lines = [
        "(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for M",
        "(APIServer pid=1)   Value error, max_model_len (9000) is greater [type=value_error]",
    ]
    assert find_cause(lines).startswith("ValidationError: Value error, max_model_len (9000)")


def test_no_cause_and_the_last_message():
    assert find_cause([WORKER + "all is well"]) is None
    assert last_message([WORKER + "Loading weights", "", "  "]) == "Loading weights"
    assert last_message([]) == ""
