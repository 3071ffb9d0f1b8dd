import pytest
from maca_serve.common.errors import UserError
from maca_serve.common.ranks import Ranks
from maca_serve.engine import fit as module
from maca_serve.engine.fit import ENGINE_BYTES, GIB, fit, kv_bytes_per_token, memory_needed
from maca_serve.formats.checkpoint import open_checkpoint

CPU, CUDA = "0.32.0+cpu", "0.32.0"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Two cores with 8 GiB free, no card, and nothing set by the user."""
    monkeypatch.setattr(module, "physical_cpus", lambda: [0, 2])
    monkeypatch.setattr(module, "available_memory", lambda: 8 * GIB)
    monkeypatch.setattr(module, "card_memory", list)
    monkeypatch.setattr(module, "cpu_flags", lambda: ["avx2", "avx512f"])
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)


def option(settings, name):
    return settings.arguments[settings.arguments.index(name) + 1]


def test_small_cpu(quantized):
    settings = fit(open_checkpoint(quantized), CPU)
    assert "--enforce-eager" in settings.arguments
    assert option(settings, "--dtype") == "bfloat16"
    assert option(settings, "--max-model-len") == "512"
    assert settings.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,2"
    assert settings.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert settings.environment["VLLM_CPU_INT4_W4A8"] == "0", "W4A16 is to be served as W4A16"
    assert "--trust-remote-code" not in settings.arguments


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["avx2"], "float32"),
        (["avx2", "avx512f"], "bfloat16"),
        (["avx2", "avx512f", "amx_bf16"], "bfloat16"),
        ([], "bfloat16"),  # not x86
    ],
)
def test_a_cpu_that_is_slow_in_bfloat16_computes_in_float32(
    make_checkpoint, monkeypatch, flags, dtype
):
    monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    checkpoint = open_checkpoint(make_checkpoint("m", weights=1000))
    settings = fit(checkpoint, CPU)
    assert option(settings, "--dtype") == dtype
    assert f" {dtype}, " in settings.words
    weights = 2000 if dtype == "float32" else 1000
    assert memory_needed(checkpoint, settings) == weights + GIB + ENGINE_BYTES


def test_long_context_is_cut_on_a_cpu_unless_asked_for(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint("long", max_position_embeddings=131072))
    assert option(fit(checkpoint, CPU), "--max-model-len") == "8192"
    assert option(fit(checkpoint, CPU, max_model_len=20000), "--max-model-len") == "20000"
    assert option(fit(checkpoint, CPU, measured=9000), "--max-model-len") == "9000"


def test_many_cores_are_left_to_vllm(quantized, monkeypatch):
    monkeypatch.setattr(module, "physical_cpus", lambda: list(range(16)))
    environment = fit(open_checkpoint(quantized), CPU).environment
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "auto"


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "binding"),
    [
        (4, 1, 1, "0"),
        (16, 1, 16, ",".join(map(str, range(16)))),
        (2, 2, None, "0|1"),
        (5, 2, None, "0,1|2,3"),
        (12, 2, None, "0,1,2,3,4|5,6,7,8,9"),
        (12, 2, 4, "0,1|2,3"),
    ],
)
def test_cores_are_divided_among_ranks(quantized, monkeypatch, cores, ranks, threads, binding):
    monkeypatch.setattr(module, "physical_cpus", lambda: list(range(cores)))
    settings = fit(open_checkpoint(quantized), CPU, ranks=Ranks(ranks), threads=threads)
    assert settings.environment["VLLM_CPU_OMP_THREADS_BIND"] == binding


@pytest.mark.parametrize(
    ("threads", "ranks", "says"),
    [
        (0, 1, "--threads: 0 is not possible: give 1 to 2 "),
        (64, 1, "--threads: 64 is not possible: give 1 to 2 "),
        (1, 2, "--threads: 1 is not possible: give 2 "),
        (None, 3, "--tp: 3 ranks want a core each; this process may use 2: use --tp 2 at most"),
        (8, 3, "--tp: 3 ranks"),
    ],
)
def test_cores_that_are_not_there(quantized, threads, ranks, says):
    with pytest.raises(UserError, match=f"^{says}"):
        fit(open_checkpoint(quantized), CPU, ranks=Ranks(ranks), threads=threads)


def test_threads_are_the_cpu_s(quantized):
    with pytest.raises(UserError, match="--threads: for vLLM's CPU build"):
        fit(open_checkpoint(quantized), CUDA, threads=1)


def test_ranks_share_the_cache(make_checkpoint, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 16 * GIB)
    shape = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}
    checkpoint = open_checkpoint(make_checkpoint("8b", max_position_embeddings=8192, **shape))
    for ranks, gib in ((Ranks(), "4"), (Ranks(2), "2")):
        assert fit(checkpoint, CPU, ranks=ranks).environment["VLLM_CPU_KVCACHE_SPACE"] == gib


def test_pipelines_are_for_cuda(quantized):
    with pytest.raises(UserError, match=r"--pp: with it vLLM's CPU build dies.*use --tp"):
        fit(open_checkpoint(quantized), CPU, ranks=Ranks(1, 2))
    arguments = fit(open_checkpoint(quantized), CUDA, ranks=Ranks(1, 2)).arguments
    assert arguments[:2] == ["--pipeline-parallel-size", "2"]


def test_it_says_what_it_chose(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint("long", max_position_embeddings=131072))
    words = fit(checkpoint, CPU).words
    assert words.startswith("8192 tokens (the model's context is 131072: --max-model-len), KV ")
    assert words.endswith("bfloat16, cores 0,2")
    assert fit(checkpoint, CUDA).words.startswith("as many tokens as the memory holds (the")


def test_what_the_user_set_stands(quantized, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "2")
    environment = fit(open_checkpoint(quantized), CPU).environment
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "2"
    environment = fit(open_checkpoint(quantized), CPU, threads=2).environment
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,2", "an option goes before"


def test_a_told_cache_may_take_more_than_half_and_must_hold_a_sequence(
    make_checkpoint, monkeypatch
):
    shape = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}
    checkpoint = open_checkpoint(make_checkpoint("8b", max_position_embeddings=65536, **shape))
    monkeypatch.setattr(module, "available_memory", lambda: 12 * GIB)
    with pytest.raises(UserError, match="set VLLM_CPU_KVCACHE_SPACE to take more"):
        fit(checkpoint, CPU, max_model_len=65536)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    settings = fit(checkpoint, CPU, max_model_len=65536)
    assert settings.environment["VLLM_CPU_KVCACHE_SPACE"] == "8"
    for told in ("7", "8.5"):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", told)
        with pytest.raises(UserError, match=rf"SPACE={told}: give whole GiB, .* takes 8.0 on a"):
            fit(checkpoint, CPU, max_model_len=65536)


def test_cuda_keeps_the_defaults(quantized):
    assert fit(open_checkpoint(quantized), CUDA).arguments == ["--max-model-len", "auto"]
    settings = fit(open_checkpoint(quantized), CUDA, max_model_len=100)
    assert settings.arguments == ["--max-model-len", "100"]


@pytest.mark.parametrize(
    ("cards", "ranks", "share"),
    [
        ([(80_000, 81_559)], 1, None),
        ([(21_000, 24_000)], 1, "0.85"),
        ([(80_000, 81_559), (40_000, 81_559)], 1, None),
        ([(80_000, 81_559), (40_000, 81_559)], 2, "0.48"),
        ([], 1, None),
    ],
)
def test_a_card_that_others_use_is_shared(quantized, monkeypatch, cards, ranks, share):
    monkeypatch.setattr(module, "card_memory", lambda: cards)
    settings = fit(open_checkpoint(quantized), CUDA, ranks=Ranks(ranks))
    assert ("--gpu-memory-utilization" in settings.arguments) == (share is not None)
    assert share is None or option(settings, "--gpu-memory-utilization") == share


def test_a_card_that_others_fill_is_refused(quantized, monkeypatch):
    monkeypatch.setattr(module, "card_memory", lambda: [(900, 24_000)])
    with pytest.raises(UserError, match="900 of 24000 MiB free: stop what else runs on it"):
        fit(open_checkpoint(quantized), CUDA)


@pytest.mark.parametrize("version", [CPU, CUDA])
def test_a_prompt_may_fill_the_context_when_measuring(quantized, version):
    settings = fit(open_checkpoint(quantized), version, measured=513)
    assert "--no-enable-prefix-caching" in settings.arguments
    assert option(settings, "--max-model-len") == "513"
    assert settings.environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"


def test_cache_grows_with_the_model(make_checkpoint):
    shape = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}
    checkpoint = open_checkpoint(make_checkpoint("8b", max_position_embeddings=4096, **shape))
    assert kv_bytes_per_token(checkpoint.config) == 2 * 2 * 32 * 8 * 128
    assert kv_bytes_per_token(checkpoint.config, "float32") == 2 * 4 * 32 * 8 * 128
    # Half a GiB for each of 4 sequences.
    assert fit(checkpoint, CPU).environment["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_memory_of_an_engine(quantized):
    checkpoint = open_checkpoint(quantized)
    assert memory_needed(checkpoint, fit(checkpoint, CPU)) == 1000 + GIB + ENGINE_BYTES


def test_ranks_share_weights_and_nothing_else(quantized, monkeypatch):
    monkeypatch.setattr(module, "physical_cpus", lambda: [0, 1])
    checkpoint = open_checkpoint(quantized)
    settings = fit(checkpoint, CPU, ranks=Ranks(2))
    assert memory_needed(checkpoint, settings) == 1000 + 2 * (GIB + ENGINE_BYTES)


def test_too_little_memory(quantized, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: GIB)
    with pytest.raises(UserError, match="too little free memory"):
        fit(open_checkpoint(quantized), CPU)


@pytest.mark.parametrize(("length", "says"), [(0, "not positive"), (513, "longer than the conte")])
def test_lengths_that_do_not_fit(quantized, length, says):
    with pytest.raises(UserError, match=says):
        fit(open_checkpoint(quantized), CPU, max_model_len=length)
