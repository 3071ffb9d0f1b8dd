"""The serving benchmark's own parts; it is run by hand."""

import json
import sys
from pathlib import Path

import pytest
from maca_serve.doctor.checks import check
from maca_serve.doctor.headers import read_headers

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import serving
from random_checkpoints import SCHEMES, make

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("scheme", ["bf16", *SCHEMES])
def test_random_checkpoints_are_what_their_config_says(tmp_path, tokenizer_files, scheme):
    folder = make(tmp_path / scheme, scheme, 2, tokenizer_files, SMALL)
    config = json.loads((folder / "config.json").read_text())
    contents = check(read_headers(folder), config.get("quantization_config") or {})
    assert contents.problems == []
    assert len(contents.quantized) == (0 if scheme == "bf16" else 14)
    assert [file.name for file in tmp_path.iterdir()] == [scheme]


def test_a_model_is_measured_once_and_its_tables_come_again(
    fake_vllm, base, quantized, tmp_path, monkeypatch, capsys
):
    folders = {"bf16": base, "w8a8": quantized}
    monkeypatch.setattr(serving, "folder_of", lambda model, scheme, layers: folders[scheme])
    monkeypatch.setattr(serving, "has_zen_kernels", lambda: False)
    monkeypatch.setattr(serving, "runnable", lambda arms: (arms, {"FP8": "no kernel"}))
    command = ["serving.py", "--models", serving.REAL, "--arms", "BF16", "W8A8"]
    command += ["--bindings", "0", "auto", "--concurrency", "1,2", "--input-len", "32"]
    command += ["--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    serving.main()
    (file,) = tmp_path.glob("serving-cpu-*.json")
    found = json.loads(file.read_text())[serving.REAL]
    assert found["tokens_per_s_by_binding"] == {"0": 10.0, "auto": 10.0}
    chosen = {name: e["environment"] for name, e in found["settings"]["engine"].items()}
    assert chosen["BF16"]["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert found["schedule"]["order"] == ["BF16", "W8A8", "W8A8", "BF16"]
    printed = capsys.readouterr().out
    assert "| W8A8 | CPUWNA16LinearKernel | 0.40 | 1.00x |" in printed
    assert "| W8A8 | 32 tokens in | nowhere |" in printed
    assert "Not measured: FP8: no kernel" in printed
    fake_vllm("does not start")
    serving.main()
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(sys, "argv", [*command, "--repeats", "3"])
    with pytest.raises(SystemExit):
        serving.main()
    assert "under other settings" in capsys.readouterr().err


def test_what_the_doctor_warns_from(tmp_path):
    def entry(name, kernel, ratio):
        ratios = {"32": {"1": {"ratio": ratio}, "4": {"ratio": 0.5}}, "512": {"1": {"ratio": 9.0}}}
        return {"name": name, "kernel": kernel, "break_even": {"ratios": ratios}}

    machine = {"cpu": "X", "cores": 2, "cpu_flags": ["avx2"], "gpus": []}
    common = {
        "machine": machine,
        "settings": {"speed": {"input_len": [32, 512], "output_len": 32}},
    }
    base = entry("BF16", "none", 1.0)
    large = [base, entry("W4A16", "K", 0.8304), entry("W4A16 as W4A8", "K", 2.0)]
    large.append(entry("W3A16", "K", 0.9))
    small = [base, entry("W4A16", "K", 0.7), entry("FP8", "L", 0.08)]
    file = tmp_path / "serving-x.json"
    file.write_text(
        json.dumps(
            {
                serving.REAL: {**common, "checkpoints": small},
                serving.SHAPED: {**common, "checkpoints": large},
            }
        )
    )
    said = {
        "machine": "2 cores of X (AVX2)",
        "like": ["avx2"],
        "tokens": "32 or 512 in, 32",
        "source": "benchmarks/results/serving-x.json",
    }
    first, same_kernel, second = serving.published(file)
    assert same_kernel["ratios"]["1 in flight at prompts of 32"] == 0.9
    loads = {"4 in flight at prompts of 32": 0.5, "1 in flight at prompts of 512": 9.0}
    ratios = {"1 in flight at prompts of 32": 0.83, **loads}
    assert first == {
        "kernel": "K",
        "model": serving.IN_WORDS["8B-shaped"],
        "ratios": ratios,
        **said,
    }
    ratios = {"1 in flight at prompts of 32": 0.08, **loads}
    assert second == {"kernel": "L", "model": "SmolLM2-135M", "ratios": ratios, **said}
