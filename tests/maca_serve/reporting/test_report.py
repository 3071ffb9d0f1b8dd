import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from maca_serve.evaluation.recovery import describe_intervals, recovered, recovery
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.reporting.report import render_report
from maca_serve.reporting.run_records import (
    diagonal_views,
    relative_diagonals,
    run_rows,
    tuning_plot,
)
from maca_serve.reporting.speed_view import alike
from maca_serve.reporting.summary import judge, rules
from maca_serve.speed.breakeven import break_even

from maca_llmc.common.stats import perplexity

RECORD = {
    "format": 1,
    "base_model": "tiny",
    "method": "maca",
    "scheme": "W4A16",
    "seed": 7,
    "calibration": {"source": "a.jsonl", "tokens": 12345, "lengths": {"128": 10, "512": 4}},
    "modules": [
        {"name": f"model.layers.{layer}.{kind}", "loss": 0.5 + layer}
        for layer in range(3)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ],
    "wall_seconds": {"load": 0.4, "calibrate": 30.4},
    "peak_rss_bytes": 2_500_000_000,
    "peak_device_bytes": None,
}
DIAGONALS = {
    "lengths": [128, 512],
    "modules": {
        "model.layers.0.self_attn.q_proj": {"128": [1.0, 2.0, 4.0], "512": [1.0, 2.0, 16.0]}
    },
}


def entry(name, speed, nll, size):
    losses = [nll - 0.5, nll, nll + 0.5]
    probe = {
        "logprob": -nll,
        "logprob_stderr": 0.1,
        "logprobs": [-loss for loss in losses],
        "exact": 0.25,
        "exact_stderr": 0.1,
        "right": 0.5,
        "right_stderr": 0.1,
        "prompts": 3,
    }
    run = {f"{m}_ms": {"mean": 6.0, "median": 5.0, "p99": 9.0} for m in ("ttft", "tpot", "e2el")}
    return {
        "name": name,
        "scheme": "BF16" if name == "base" else "W4A16 int, group 64, symmetric",
        "kernel": "K",
        "size_bytes": size,
        "perplexity": {n: perplexity(losses) | {"losses": losses} for n in ("64", "256")},
        "probes": {name: {"64": probe, "256": probe} for name in ("needle", "copy")},
        "tasks": {
            "continuation": {
                "acc": 0.5,
                "acc_stderr": 0.1,
                "acc_norm": 0.4,
                "acc_norm_stderr": 0.1,
                "questions": 20,
            },
            "named": {"metric": "exact_match", "exact_match": 0.25, "questions": 8},
        },
        "throughput": {
            "128": {
                level: {
                    **run,
                    "output_tokens_per_s": s,
                    "total_tokens_per_s": 5 * s,
                    "rounds": [s, s],
                }
                for level, s in speed.items()
            }
        },
        "memory": {
            "weights_bytes": size,
            "weights_source": "files",
            "kv_cache_bytes": None,
            "kv_cache_tokens": None,
        },
        "bandwidth": {"weights_bytes_per_token": size, "bytes_per_s": 1e9, "share": 0.42},
    }


@pytest.fixture
def results():
    entries = [
        entry("base", {"1": 10.0, "4": 40.0}, 3.0, 4_000_000),
        entry("w4 <b>", {"1": 18.3, "4": 21.6}, 3.0 + math.log(1.25), 1_000_000),
    ]
    for each in entries:
        each["recovery"] = recovery(entries[0], each)
    entries[1]["break_even"] = break_even(entries[0], entries[1])
    entries[1]["verdict"] = judge(*entries)
    return {
        "machine": {
            "cpu": "Some CPU",
            "cores": 2,
            "gpus": [],
            "copy_bandwidth": {"bytes_per_s": 12.3e9, "on": "CPU, 2 threads"},
        },
        "versions": {"vllm": "0.32.0+cpu"},
        "settings": {
            "accuracy": {
                "windows": 16,
                "targets_per_window": 32,
                "needle_depths": [0.0, 0.5, 1.0],
            },
            "intervals": describe_intervals(),
            "rules": rules(),
            "speed": {"input_len": [128], "output_len": 32, "repeats": 2},
            "engine": {name: {"arguments": ["--enforce-eager"]} for name in ("base", "w4")},
        },
        "schedule": {
            "engines": "together",
            "why": "there is room",
            "starts": 2,
            "order": ["base", "w4", "w4", "base"],
        },
        "checkpoints": entries,
    }


@pytest.fixture
def checkpoints(base, quantized):
    (quantized / "maca_run.json").write_text(json.dumps(RECORD))
    (quantized / "maca_diagonals.json").write_text(json.dumps(DIAGONALS))
    return [open_checkpoint(base), open_checkpoint(quantized)]


class Page(HTMLParser):
    """Counts elements, and collects whatever a browser would fetch."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.fetched, self.ids = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action") and value[0] != "#":
                self.fetched.append(value[:40])
            if name == "id":
                self.ids.append(value)


def test_page_fetches_nothing_and_has_every_plot(results, checkpoints):
    html = render_report(results, checkpoints)
    page = Page(html)
    # Heat maps are pictures inside the page.
    assert {value[:15] for value in page.fetched} == {"data:image/png;"}
    assert not {"script", "link", "iframe", "object"} & set(page.elements)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    # Size, perplexity, recovery, tasks, two probes, two of speed, losses, one diagonal.
    assert page.elements.count("svg") == 10
    assert "w4 &lt;b&gt;" in html
    assert "w4 <b>" not in html
    assert "not for quality" in html
    # Nothing of a plot is of one colour for light and dark.
    assert not re.search(r"(?:fill|stroke): #(?!ffffff)", html)


def test_page_without_inspection(results, base, quantized):
    html = render_report(results, [open_checkpoint(base), open_checkpoint(quantized)])
    assert "How they were made" not in html
    assert "What each input length sees" not in html
    assert Page(html).elements.count("svg") == 8


def test_tables_hold_the_numbers_of_results(results, checkpoints):
    html = render_report(results, checkpoints)
    for each in results["checkpoints"]:
        cells = [f"{each['size_bytes'] / 1e6:.0f}", "–"]
        for found in each["perplexity"].values():
            cells.append(f"{found['ppl']:.2f} ± {found['stderr']:.2f}")
        cells += ["0.500 ± 0.100", "0.400 ± 0.100", "0.250"]
        for by_length in each["probes"].values():
            cells += [f"{found['logprob']:.3f} ± 0.100" for found in by_length.values()]
        for run in each["throughput"]["128"].values():
            cells += [f"{run['output_tokens_per_s']:.1f}", f"{run['tpot_ms']['median']:.1f}"]
        for text in cells:
            assert f"<td>{text}</td>" in html, text
    kept, interval = recovered(results["checkpoints"][1], "perplexity", "mean")
    low, high = interval
    assert f'<td>{kept:.1f} %<br><span class="note">{low:.1f} to {high:.1f}</span></td>' in html
    assert "<td>100.0 %</td>" in html, "the base has no interval"


def test_speed_says_how_it_was_measured_and_where_it_ends(results, base, quantized):
    checkpoints = [open_checkpoint(base), open_checkpoint(quantized)]
    html = " ".join(render_report(results, checkpoints).split())
    assert "the order base, w4, w4, base" in html
    assert "engines together (there is room; 2 starts)" in html
    assert "<td>up to 1, no longer at 4</td>" in html
    assert "12.3 GB/s" in html
    assert "<td>42%</td>" in html


def test_eager_mode_is_named_where_it_was_one(results, checkpoints):
    assert "eager mode" in render_report(results, checkpoints)
    for engine in results["settings"]["engine"].values():
        engine["arguments"].clear()
    assert "eager mode" not in render_report(results, checkpoints)


def test_where_the_engine_does_the_same_work_the_spread_is_named(results, checkpoints):
    base = results["checkpoints"][0]
    assert list(alike(results["checkpoints"])) == []
    second = entry("maca", {"1": 19.0, "4": 20.0}, 3.0, 1_000_000)
    other = entry("w8", {"1": 30.0, "4": 80.0}, 3.0, 2_000_000) | {"kernel": "other"}
    for each in (second, other):
        each["recovery"], each["break_even"] = recovery(base, each), break_even(base, each)
        each["verdict"] = judge(base, each)
    results["checkpoints"] += [second, other]
    (sentence,) = alike(results["checkpoints"])
    assert sentence.startswith(
        "w4 <b> and maca have the same scheme (W4A16 int, group 64, symmetric) and kernel (K), so"
    )
    assert (
        "differ by, 1.83x to 1.90x with 1 in flight and 0.50x to 0.54x with 4 in flight, is"
        in sentence
    )
    html = render_report(results, [*checkpoints, checkpoints[1], checkpoints[1]])
    assert "w4 &lt;b&gt; and maca have the same scheme" in html


def test_the_first_table_has_what_decides_first(results, checkpoints):
    html = render_report(results, checkpoints)
    titles = ("MB on disk", "perplexity<br>recovery", "task<br>", ">scheme<", ">vLLM kernel<")
    places = [html.index(title) for title in titles]
    assert places == sorted(places)


def test_lengths_rates_and_what_was_not_computed(results, base, quantized):
    for each in results["checkpoints"]:
        each["throughput"]["512"] = each["throughput"]["128"]
        each["rates"] = {
            n: {"0.5": dict(each["throughput"]["128"]["1"], requests_per_s=0.45)}
            for n in ("128", "512")
        }
    first, other = results["checkpoints"]
    other["break_even"] = break_even(first, other)
    other["bandwidth"] = {"not_computed": "not all experts are read for a token"}
    html = render_report(results, [open_checkpoint(base), open_checkpoint(quantized)])
    assert Page(html).elements.count("svg") == 12
    assert "w4 &lt;b&gt;: not computed, not all experts" in html
    # Each in flight along the lengths, and each length along those in flight.
    assert "<td>1 in flight</td><td>at all measured</td>" in html
    assert "<td>0.45</td>" in html


def test_run_record():
    rows = dict(run_rows(RECORD))
    assert rows["method"] == "maca"
    assert rows["sequences by length"] == "10 x 128, 4 x 512"
    assert rows["calibration tokens"] == "12,345"
    assert rows["wall time"] == "load 0.4 s, calibrate 30.4 s"
    assert rows["peak memory"] == "2.50 GB"
    assert "peak device memory" not in rows
    assert run_rows({}) == []


def test_scale_of_a_length_cancels_and_its_shape_stays():
    same = relative_diagonals([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]])
    assert same == pytest.approx(0.0)
    # Logs (0 1 2) and (0 1 4), centred per length: (-1 0 1) and (-5/3 -2/3 7/3).
    other = relative_diagonals([[1.0, 2.0, 4.0], [1.0, 2.0, 16.0]])
    assert other[1].tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3])
    assert other[0].tolist() == pytest.approx([1 / 3, 1 / 3, -2 / 3])


def test_views_count_the_channels_that_differ(checkpoints):
    (view,) = diagonal_views(checkpoints[1])
    # Spreads 2/3, 2/3 and 4/3 of an octave, all above 1.5-fold.
    assert (view.share, view.channels) == (100.0, 3)
    assert diagonal_views(checkpoints[0]) == []


def test_one_length_has_nothing_to_compare(quantized):
    path: Path = quantized / "maca_diagonals.json"
    path.write_text(json.dumps({"modules": {"m": {"128": [1.0, 2.0]}}}))
    assert diagonal_views(open_checkpoint(quantized)) == []


TUNING = {
    "blocks": {"steps": 50},
    "end_to_end": {"rate": 1e-3},
    "layers": [{"before": 0.2, "after": 0.1, "changed": 0.3}] * 3,
    "held_out_kl": [{"128": 0.4, "512": 0.3}, {"128": 0.2, "512": 0.1}],
    "calibration": {"tokens": 16384},
    "wall_seconds": {"blocks": 60.0, "end_to_end": 40.4},
}


def test_what_tuning_did_is_drawn_and_told(quantized):
    path: Path = quantized / "maca_run.json"
    path.write_text(json.dumps(RECORD | {"tuning": TUNING}))
    checkpoint = open_checkpoint(quantized)
    both = tuning_plot(checkpoint)
    assert all(f">{words}<" in both for words in ("layer", "128 tokens", "512 tokens"))
    assert dict(run_rows(checkpoint.run_record))["tuned"] == (
        "blocks, end to end; 16,384 tokens, 100 s"
    )
    path.write_text(json.dumps(RECORD | {"tuning": TUNING | {"held_out_kl": []}}))
    assert "tokens<" not in tuning_plot(open_checkpoint(quantized))
    path.write_text(json.dumps(RECORD))
    assert tuning_plot(open_checkpoint(quantized)) is None
    assert "tuned" not in dict(run_rows(RECORD))
