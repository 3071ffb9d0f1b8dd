import json
import shutil
import subprocess

import numpy as np
import pytest
from maca_serve.common.errors import UserError
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.speed import bandwidth
from maca_serve.speed.memory import bandwidth_share, bytes_per_token, memory
from safetensors.numpy import save_file

LAYER = {
    "model.layers.0.up_proj.weight_packed": np.zeros((8, 2), np.int32),
    "model.layers.0.up_proj.weight_scale": np.zeros((8, 1), np.float32),
    "model.norm.weight": np.zeros(4, np.float16),
}
EMBEDDING = {"model.embed_tokens.weight": np.zeros((100, 4), np.float16)}
HEAD = {"lm_head.weight": np.zeros((100, 4), np.float32)}
LAYER_BYTES = 64 + 32 + 8


@pytest.fixture
def holding(quantized):
    """A checkpoint with these tensors."""

    def make(tensors, **config):
        save_file(tensors, quantized / "model.safetensors")
        content = json.loads((quantized / "config.json").read_text())
        (quantized / "config.json").write_text(json.dumps({**content, **config}))
        return open_checkpoint(quantized)

    return make


def test_an_embedding_is_read_only_as_the_head(holding):
    assert bytes_per_token(holding({**LAYER, **EMBEDDING})) == LAYER_BYTES + 800
    # A head of 32 bits is served in 16; scales stay as they are.
    assert bytes_per_token(holding({**LAYER, **EMBEDDING, **HEAD})) == LAYER_BYTES + 800


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_local_experts": 8}, "not all experts"),
        ({"vision_config": {}}, "more than a language model"),
    ],
)
def test_what_is_not_computed(holding, config, says):
    with pytest.raises(UserError, match=says):
        bytes_per_token(holding({**LAYER, **EMBEDDING}, **config))


def test_embedding_of_another_name(holding):
    with pytest.raises(UserError, match="input embedding"):
        bytes_per_token(holding(LAYER))


def test_share(holding):
    checkpoint = holding({**LAYER, **EMBEDDING})

    def runs(level, tpot):
        return {level: {"tpot_ms": {"median": tpot}}}

    found = bandwidth_share(checkpoint, {"512": runs("1", 9.0), "32": runs("1", 2.0)}, 904e3)
    assert found == {"weights_bytes_per_token": 904, "bytes_per_s": 452e3, "share": 0.5}
    found = bandwidth_share(checkpoint, {"32": runs("1", 2.0)}, 904e3, "float32")
    assert found["weights_bytes_per_token"] == 64 + 32 + 2 * (8 + 800)
    found = bandwidth_share(checkpoint, {"32": runs("4", 2.0)}, 904e3)
    assert found == {"not_computed": "nothing ran with 1 request in flight"}


def test_memory_is_the_logs_where_it_says(quantized):
    checkpoint = open_checkpoint(quantized)
    log = ["Model loading took 0.25 GiB memory and 1.0 seconds"]
    assert memory(checkpoint, log)["weights_bytes"] == 1024**3 // 4
    assert memory(checkpoint, log)["weights_source"] == "vLLM's log"
    assert memory(checkpoint, [])["weights_source"] == "files"


def test_memory_of_all_ranks(quantized):
    checkpoint = open_checkpoint(quantized)
    log = [
        "(Worker_TP0 pid=1) INFO Model loading took 0.25 GiB memory and 1.0 seconds",
        "(Worker_TP1 pid=2) INFO Model loading took 0.25 GiB memory and 1.0 seconds",
        "(Worker_TP0 pid=1) INFO Available KV cache memory: 1.5 GiB",
        "(EngineCore pid=3) INFO GPU KV cache size: 1,024 tokens",
    ]
    assert memory(checkpoint, log, ranks=2) == {
        "weights_bytes": 1024**3 // 2,
        "weights_source": "vLLM's log",
        "kv_cache_bytes": 3 * 1024**3,
        "kv_cache_tokens": 1024,
    }
    # What the files say is of all ranks already.
    assert memory(checkpoint, [], ranks=2)["weights_bytes"] == 1000


def test_a_copy_counts_reads_and_writes(monkeypatch):
    monkeypatch.setattr(bandwidth, "ARRAY_BYTES", 8 * 1024**2)
    found = bandwidth.copy_bandwidth("0.32.0+cpu")
    assert found["on"].endswith("threads")
    seconds = 2 * 8 * 1024**2 / found["bytes_per_s"]
    assert 1e-5 < seconds < 1.0


def test_every_card_has_a_bandwidth_of_its_own(monkeypatch):
    said = json.dumps({"bytes_per_s": 3e12, "on": "NVIDIA H100"})
    child = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(bandwidth.subprocess, "run", lambda *_, **__: child)
    assert bandwidth.copy_bandwidth("0.32.0") == {"bytes_per_s": 3e12, "on": "NVIDIA H100"}
    two = {"bytes_per_s": 6e12, "on": "2 x NVIDIA H100"}
    assert bandwidth.copy_bandwidth("0.32.0", ranks=2) == two


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a card")
def test_no_card():
    with pytest.raises(UserError, match="copy bandwidth cannot be measured"):
        bandwidth.copy_bandwidth("0.32.0")
