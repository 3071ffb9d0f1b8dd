import json
import math
from datetime import UTC, datetime

import pytest
from maca_serve import EngineError, IncompleteError, UserError, accuracy, compare, throughput
from maca_serve.engine import fit
from maca_serve.speed import alternation

SMALL = {"lengths": [40, 64, 128], "windows": 3, "limit": 4}


@pytest.fixture
def settings(text, tmp_path):
    return {"text": text, "output": tmp_path / "out", **SMALL}


def test_both_files_and_their_numbers(fake_vllm, base, quantized, settings):
    results = compare(base, [quantized], **settings)
    assert json.loads((settings["output"] / "results.json").read_text()) == results
    assert sorted(file.name for file in settings["output"].iterdir()) == [
        "report.html",
        "results.json",
    ]
    assert datetime.fromisoformat(results["created"]).tzinfo is UTC
    first, second = results["checkpoints"]
    assert [first["name"], second["name"]] == ["base", "w4"]
    assert second["scheme"] == "W4A16 int, group 64, symmetric"
    assert second["kernel"] == "CPUWNA16LinearKernel"
    assert second["size_bytes"] == 1000
    assert list(second["perplexity"]) == ["40", "64", "128"]
    assert set(second["perplexity"]["64"]) >= {"ppl", "stderr", "nll"}
    assert set(second["tasks"]["continuation"]) >= {"acc", "acc_stderr", "acc_norm"}
    assert {n: list(runs) for n, runs in second["throughput"].items()} == {"128": ["1", "4"]}
    assert second["throughput"]["128"]["4"]["rounds"] == [40.0, 40.0]
    assert second["break_even"]["by_length"] == {"128": {"faster_at": [], "stops_at": None}}
    assert second["memory"] == {
        "weights_bytes": 1000,
        "weights_source": "files",
        "kv_cache_bytes": 1024**3,
        "kv_cache_tokens": 46592,
    }
    # The fake's weights are none of a real model.
    assert "none of the tensors is known" in second["bandwidth"]["not_computed"]
    assert results["schedule"]["order"] == ["base", "w4", "w4", "base"]
    assert results["machine"]["copy_bandwidth"]["bytes_per_s"] > 1e8
    # The fake engine does not read weights: both are equally good.
    everywhere = ["40", "64", "128", "mean"]
    kept = second["recovery"]
    assert kept["perplexity"] == dict.fromkeys(everywhere, 100.0)
    assert kept["intervals"]["perplexity"] == {n: [100.0, 100.0] for n in everywhere}
    assert second["verdict"]["size_percent"] == 25.0
    assert second["dtype"] == "bfloat16"
    assert results["settings"]["accuracy"]["special_tokens"] == [1]
    assert results["settings"]["intervals"]["seed"] == 0
    assert results["settings"]["accuracy"]["windows"] == 3
    assert results["machine"]["cores"] >= 1
    assert results["versions"]["vllm"] == "0.32.0+cpu"


def test_perplexity_through_the_server_is_that_of_the_ids(fake_vllm, quantized, text):
    results = accuracy([quantized], text=text, tasks=[], lengths=[40, 64], windows=2)
    documents = [json.loads(line)["text"].split() for line in text.read_text().splitlines()]
    ids = [[int(word[1:]) + 2 for word in document] for document in documents]
    for length in (40, 64):
        losses = []
        for document in ids[:2]:
            window = [1, *document[63 - (length - 1) : 63]]
            losses.append(-sum(by_hand(window, i) for i in range(length - 32, length)) / 32)
        found = results["checkpoints"][0]["perplexity"][str(length)]
        assert found["nll"] == pytest.approx(sum(losses) / 2)
        assert found["ppl"] == pytest.approx(math.exp(sum(losses) / 2))


def by_hand(ids, place):
    """What fake/vllm/model.py computes, written again."""
    return -(1.0 + ((31 * ids[place - 1] + 7 * ids[place]) % 97) / 50.0 + 4.0 / place)


def test_each_part_alone_writes_its_file(fake_vllm, base, quantized, text, tmp_path):
    results = throughput([base, quantized], concurrency=[2], output=tmp_path / "speed.json")
    assert json.loads((tmp_path / "speed.json").read_text()) == results
    assert [list(e["throughput"]["128"]) for e in results["checkpoints"]] == [["2"], ["2"]]
    assert "break_even" not in results["checkpoints"][0]
    assert all("perplexity" not in entry for entry in results["checkpoints"])
    results = accuracy([quantized], text=text, names=["mine"], **SMALL)
    assert results["checkpoints"][0]["name"] == "mine"
    assert "throughput" not in results["checkpoints"][0]


def test_every_engine_has_the_ranks_asked_for(fake_vllm, base, text, monkeypatch):
    monkeypatch.setattr(fit, "physical_cpus", lambda: [0, 1])
    results = throughput([base], concurrency=[1], tensor_parallel=2)
    settings = results["settings"]["engine"]["base"]
    place = settings["arguments"].index("--tensor-parallel-size")
    assert settings["arguments"][place + 1] == "2"
    assert settings["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert results["checkpoints"][0]["memory"]["kv_cache_bytes"] == 2 * 1024**3
    with pytest.raises(UserError, match=r"--tp: 4 attention heads .* 3"):
        accuracy([base], text=text, tensor_parallel=3, **SMALL)


def test_local_task_files(fake_vllm, quantized, text, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"w{i}", "choices": ["w1", "w2 w3"], "answer": 1} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = accuracy([quantized], text=text, tasks=["continuation", str(path)], **SMALL)
    found = tasks["checkpoints"][0]["tasks"]
    assert {name: task["questions"] for name, task in found.items()} == {
        "continuation": 4,
        "mine": 4,
    }


def test_lengths_up_to_the_context_and_probes(fake_vllm, make_checkpoint, text):
    long = make_checkpoint("long", max_position_embeddings=9000)
    document = [f"w{i % 199}" for i in range(19000)]
    text.write_text(json.dumps({"text": " ".join(document)}))
    results = accuracy(
        [long],
        text=text,
        lengths=[64, 4096, "context"],
        windows=2,
        tasks=["needle", "copy"],
    )
    (entry,) = results["checkpoints"]
    lengths = ["64", "4096", "9000"]
    assert results["settings"]["accuracy"]["lengths"] == [64, 4096, 9000]
    assert [list(values) for values in (entry["perplexity"], *entry["probes"].values())] == [
        lengths
    ] * 3
    # The engine takes the prompt and the one token of output that it insists on.
    arguments = results["settings"]["engine"]["long"]["arguments"]
    assert arguments[arguments.index("--max-model-len") + 1] == "9001"
    ids = [1, *(i % 199 + 2 for i in range(8999))]
    loss = -sum(by_hand(ids, place) for place in range(9000 - 32, 9000)) / 32
    assert entry["perplexity"]["9000"]["losses"][0] == pytest.approx(loss)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": [64, 1024]}, "longer than the model's context 512"),
        ({"lengths": [64, 32]}, "32 after 64"),
        ({"windows": 50}, "spans of 128 tokens, 50 windows"),
        ({"limit": 1}, "--limit: 1"),
        ({"lengths": ["all"]}, "'all' is neither a number nor `context`"),
        ({"tasks": ["usual", "boolq"]}, "the name 'boolq' is taken"),
        ({"tasks": ["nope.jsonl"]}, "nope.jsonl: no such file"),
        ({"concurrency": [0]}, "--concurrency"),
        ({"rates": "fast"}, "--rates"),
        ({"input_len": [32, 500], "output_len": 13}, "together longer than the context"),
        ({"names": ["one"]}, "1 names for 2"),
        ({"output": "/dev/null/nope"}, "cannot be written"),
    ],
)
def test_bad_input_writes_nothing(fake_vllm, base, quantized, settings, changes, says):
    fake_vllm("does not start")
    with pytest.raises(UserError, match=says):
        compare(base, [quantized], **{**settings, **changes})
    assert not settings["output"].exists()


def test_unquantized_folder_among_the_quantized(fake_vllm, base, make_checkpoint, settings):
    other = make_checkpoint("other", quantized=False)
    with pytest.raises(UserError, match="other: not a quantized checkpoint"):
        compare(base, [other], **settings)
    assert not settings["output"].exists()


def test_a_base_of_another_model(fake_vllm, make_checkpoint, quantized, settings):
    fake_vllm("does not start")
    other = make_checkpoint("other", quantized=False, hidden_size=128)
    with pytest.raises(UserError, match=r"BASE: .*other has hidden_size 128 and .*w4 64; give"):
        compare(other, [quantized], **settings)
    assert not settings["output"].exists()


def test_other_tokenizer(fake_vllm, base, quantized, settings):
    file = quantized / "tokenizer.json"
    file.write_text(file.read_text().replace('"w1":', '"v1":'))
    with pytest.raises(UserError, match="w4: its tokenizer gives other token ids"):
        compare(base, [quantized], **settings)


def test_failing_engine_before_anything_is_measured_writes_nothing(
    fake_vllm, base, quantized, settings
):
    fake_vllm("does not start")
    with pytest.raises(EngineError, match="did not start") as error:
        compare(base, [quantized], **settings)
    assert not isinstance(error.value, IncompleteError)
    assert not settings["output"].exists()
    assert error.value.details


@pytest.fixture(params=[0, 10**12], ids=["in turn", "together"])
def memory(request, monkeypatch):
    """Engines are up one after another, or all at once."""
    monkeypatch.setattr(alternation, "available_memory", lambda: request.param)


def broken(error, settings):
    """What stands in results.json: names measured, and what failed."""
    found = json.loads((settings["output"] / "results.json").read_text())
    assert error.value.results == found
    assert str(error.value).endswith(f"what was measured is in {settings['output']}/results.json")
    return [entry["name"] for entry in found["checkpoints"]], found["failed"]


def test_an_engine_that_does_not_start_costs_its_own_measurements_only(
    fake_vllm, base, quantized, make_checkpoint, settings, memory
):
    fake_vllm("does not start for w4")
    with pytest.raises(
        IncompleteError, match=r"w4: vLLM did not start: ValueError: no ker"
    ) as error:
        compare(base, [quantized, make_checkpoint("w8")], **settings)
    names, (failed,) = broken(error, settings)
    assert names == ["base", "w8"]
    assert failed["name"] == "w4" and "no kernel for 3 bits" in failed["error"]
    assert failed["measured"] == {}
    last = error.value.results["checkpoints"][1]
    assert last["verdict"]["verdict"] and last["throughput"]["128"]["4"]["rounds"] == [40.0, 40.0]
    report = (settings["output"] / "report.html").read_text()
    assert "w4: not measured" in report and "no kernel for 3 bits" in report


def test_only_the_base_is_left(fake_vllm, base, quantized, settings, memory):
    fake_vllm("does not start for w4")
    with pytest.raises(IncompleteError) as error:
        compare(base, [quantized], **settings)
    assert broken(error, settings)[0] == ["base"]
    assert "w4: not measured" in (settings["output"] / "report.html").read_text()


@pytest.mark.parametrize("fault", ["does not start later", "dies in bench"])
def test_what_was_measured_of_those_that_fail_is_kept(
    fake_vllm, base, quantized, settings, monkeypatch, fault
):
    monkeypatch.setattr(alternation, "available_memory", lambda: 0)
    settings["output"].mkdir()
    (settings["output"] / "report.html").write_text("of an earlier run")
    fake_vllm(f"{fault} for base")
    with pytest.raises(IncompleteError) as error:
        compare(base, [quantized], **settings)
    names, failed = broken(error, settings)
    assert names == [] and not (settings["output"] / "report.html").exists()
    by_name = {each["name"]: each for each in failed}
    assert list(by_name["base"]["measured"]["perplexity"]) == ["40", "64", "128"]
    assert "not compared, for" in by_name["w4"]["error"]
    measured = by_name["w4"]["measured"]
    if fault == "dies in bench":  # at the first visit to the base
        assert measured == {}
    else:
        assert measured["throughput"]["128"]["4"]["rounds"] == [40.0, 40.0]
        assert by_name["base"]["measured"]["throughput"]["128"]["4"]["rounds"] == [40.0]


def test_one_of_several_dies_while_all_are_timed(fake_vllm, base, quantized, settings, monkeypatch):
    monkeypatch.setattr(alternation, "available_memory", lambda: 10**12)
    fake_vllm("dies in bench for w4")
    with pytest.raises(IncompleteError, match=r"w4: vLLM died while it was used: Memory") as error:
        compare(base, [quantized], **settings)
    assert error.value.details
    names, failed = broken(error, settings)
    assert names == [] and all("perplexity" in each["measured"] for each in failed)


@pytest.mark.parametrize("output", [True, False])
def test_each_part_alone_keeps_what_it_measured(fake_vllm, base, quantized, text, tmp_path, output):
    file = tmp_path / "a.json" if output else None
    fake_vllm("does not start for base")
    with pytest.raises(IncompleteError, match="base: vLLM did not start") as error:
        accuracy([base, quantized], text=text, output=file, **SMALL)
    assert [entry["name"] for entry in error.value.results["checkpoints"]] == ["w4"]
    assert file is None or json.loads(file.read_text()) == error.value.results
    fake_vllm("does not start for w4")
    with pytest.raises(IncompleteError, match="w4: vLLM did not start") as error:
        throughput([base, quantized], concurrency=[2], output=file)
    assert [entry["name"] for entry in error.value.results["checkpoints"]] == ["base"]
    assert file is None or json.loads(file.read_text()) == error.value.results
