"""The same through the real vLLM, on checkpoints that MACA_TEST_CHECKPOINTS names."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import cores
import four_bits
import httpx
import psutil
import pytest
import torch
from lm_eval_tasks import CHOICE, write_task
from maca_serve import UserError, accuracy, compare, throughput, up
from maca_serve.engine.client import Client
from maca_serve.evaluation import harness
from maca_serve.speed.bench import Benchmark
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOLDER = os.environ.get("MACA_TEST_CHECKPOINTS")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        FOLDER is None, reason="MACA_TEST_CHECKPOINTS names no folder with base/ and w4a16/"
    ),
]


QUESTIONS = """\
The capital of France is: Paris, Berlin
The opposite of hot is: blue, cold
A dog is an: animal, idea
Ice is frozen: fire, water
Seven days are one: week, mile
Fish live in: trees, water
Grass is: green, loud
The heart pumps: sand, blood
Bees make: honey, steel
Milk comes from: stones, cows
"""


@pytest.fixture
def checkpoints() -> tuple[Path, Path]:
    return Path(FOLDER, "base"), Path(FOLDER, four_bits.LOW_BIT)


@pytest.fixture
def questions(tmp_path, monkeypatch) -> list[str]:
    """The same questions as a file and as a task of lm-eval; every third answer is wrong."""
    data = tmp_path / "questions.jsonl"
    with data.open("w") as file:
        for i, line in enumerate(QUESTIONS.splitlines()):
            question, _, choices = line.partition(": ")
            row = {"question": question, "choices": choices.split(", ")}
            row["answer"] = (i + (i % 3 == 2)) % 2
            file.write(json.dumps(row) + "\n")
    if find_spec("lm_eval") is None:
        return [str(data)]
    from lm_eval.tasks import TaskManager

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_task(tasks, "theirs", data, "acc", CHOICE)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr(harness, "_task_manager", lambda: manager)
    return [str(data), "theirs"]


def test_compare(checkpoints, questions, tmp_path):
    base, quantized = checkpoints
    results = compare(
        base,
        [quantized],
        lengths=[64, 128],
        windows=4,
        tasks=["continuation", *questions],
        limit=10,
        concurrency=[1],
        prompts=2,
        output_len=8,
        output=tmp_path,
    )
    first, second = json.loads((tmp_path / "results.json").read_text())["checkpoints"]
    assert first["kernel"] == f"none ({'BF16' if four_bits.RUN else 'FP32'})"
    assert second["kernel"].endswith("LinearKernel")
    assert second["throughput"]["128"]["1"]["requests"] == 4
    assert 30 < second["recovery"]["perplexity"]["mean"] < 130
    assert first["perplexity"]["128"]["ppl"] < first["perplexity"]["64"]["ppl"]
    own, *theirs = (second["tasks"][Path(name).stem]["scores"] for name in questions)
    assert 5 <= sum(own) <= 9
    assert all(scores == own for scores in theirs)
    assert results["checkpoints"][0]["size_bytes"] > second["size_bytes"]
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_prompt_alone_and_among_others_scores_alike_and_nothing_is_left(checkpoints, alive):
    with up(checkpoints[1], port=None, max_model_len=512) as engine:
        group = engine._process.pid
        client: Client = engine.client()
        prompts = [[100 + i, *range(200, 240 + 7 * i)] for i in range(4)]
        together = client.prompt_logprobs(prompts)
        for prompt, among in zip(prompts, together, strict=True):
            (alone,) = client.prompt_logprobs([prompt])
            # bfloat16 sums in another order: 1/64 of a nat per token.
            assert alone == pytest.approx(among, abs=0.25)
            assert sum(alone) / len(alone) == pytest.approx(sum(among) / len(among), abs=1 / 64)
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        assert not (int(fields[2]) == group and alive(int(status.parent.name)))


@pytest.mark.parametrize(
    ("victim", "phase", "says"),
    [
        ("VLLM::EngineCore", "scoring", "engine core exited unexpectedly and named no error"),
        ("VLLM::Worker", "timing", r"Worker proc \S+ died unexpectedly"),
    ],
)
def test_a_process_of_the_engine_that_is_killed_is_the_cause(
    checkpoints, monkeypatch, victim, phase, says
):
    """The server itself lives on for a moment, answers with errors, and ends with exit code 0."""
    where = {"scoring": (Client, "prompt_logprobs"), "timing": (Benchmark, "run")}[phase]
    call = getattr(*where)
    everybody: list[psutil.Process] = []

    def kill_and_call(*arguments, **named):
        everybody.extend(psutil.Process().children(recursive=True))
        (process,) = (each for each in everybody if each.name().startswith(victim))
        process.kill()
        return call(*arguments, **named)

    monkeypatch.setattr(*where, kill_and_call)
    with pytest.raises(UserError, match=f"vLLM died while it was used: {says}"):
        if phase == "scoring":
            accuracy([checkpoints[1]], lengths=[64], windows=2, limit=2)
        else:
            throughput([checkpoints[1]], concurrency=[1], prompts=2, input_len=[32], output_len=8)
    assert not [p for p in everybody if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_what_vllm_cannot_load_is_named(checkpoints, tmp_path):
    for file in checkpoints[1].iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoints[1] / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vLLM did not start: .*NoSuchModel"):
        up(tmp_path, port=None).__enter__()


@cores.two_needed
def test_two_ranks_compute_what_one_process_does(checkpoints, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=49152, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoints[0]).save_pretrained(tmp_path)
    ids = list(range(100, 160))
    with up(tmp_path, port=None, tensor_parallel=2, api_key="key") as engine:
        (found,) = engine.client().prompt_logprobs([ids])
        for path in ("/invocations", "/tokenize", "/v1/completions", "/metrics"):
            assert httpx.get(f"{engine.url}{path}", trust_env=False).status_code == 401
        workers = psutil.Process(engine._process.pid).children(recursive=True)
        assert [process.name() for process in workers if "TP" in process.name()] == [
            "VLLM::Worker_TP0",
            "VLLM::Worker_TP1",
        ]
    with torch.no_grad():
        logits = model.float()(torch.tensor([ids])).logits[0, :-1]
    wanted = logits.log_softmax(-1)[range(59), ids[1:]]
    assert found == pytest.approx(wanted.tolist(), abs=0.05)
