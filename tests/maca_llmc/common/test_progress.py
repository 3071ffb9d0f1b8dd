"""The one bar, and the quiet around it."""

import warnings

import pytest
import torch
import tqdm
import tqdm.auto
from loguru import logger

from maca_llmc.common.progress import layer_progress, log_warnings_once, quiet, reading_progress


@pytest.fixture
def shown(capsys):
    """All that was written to standard error so far."""
    parts = []

    def read():
        parts.append(capsys.readouterr().err)
        return "".join(parts)

    return read


@pytest.fixture
def bars(monkeypatch):
    """The bars that are opened."""
    opened = []
    original = tqdm.tqdm.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        opened.append(self)

    monkeypatch.setattr(tqdm.tqdm, "__init__", init)
    return opened


def test_the_bar_counts_every_layer_batch_and_pass(shown, bars):
    layers = [torch.nn.Identity() for _ in range(3)]
    with layer_progress(layers, batches=2):
        bar = bars[0]
        assert bar.total == 3 * 2 * 2 - 2  # the last layer's outputs go nowhere
        for number, layer in enumerate(layers, start=1):
            for call in range(4 if number < 3 else 2):
                layer(torch.ones(1))
                assert bar.n == 4 * (number - 1) + call + 1
            assert bar.desc == f"layer {number}/3"
    assert bar.n == bar.total and "100%" in shown()
    layers[0](torch.ones(1))
    assert bar.n == bar.total, "the hook outlived the bar"


def test_more_calls_than_expected_do_not_take_the_percentage_away(shown, bars):
    layers = [torch.nn.Identity() for _ in range(2)]
    with layer_progress(layers, batches=2):
        for layer in layers:
            for _ in range(7):  # checks of smoothers, llm-compressor's own pipeline
                layer(torch.ones(1))
    assert bars[0].n == bars[0].total and "layer 2/2 100%" in shown()


def test_layers_finished_in_an_earlier_run_are_only_passed_through(bars):
    with layer_progress([torch.nn.Identity() for _ in range(3)], batches=2, finished=2):
        assert bars[0].total == 2 + 2 + 2
    with layer_progress([torch.nn.Identity() for _ in range(3)], batches=2, finished=3):
        assert bars[1].total == 2 + 2


def test_more_passes_take_longer(bars):
    with layer_progress([torch.nn.Identity() for _ in range(3)], batches=2, passes=6, finished=1):
        assert bars[0].total == 2 * (1 + 6 + 5)


def test_a_failing_run_does_not_show_a_full_bar(shown, bars):
    layer = torch.nn.Identity()
    with pytest.raises(RuntimeError), layer_progress([layer], batches=2):
        layer(torch.ones(1))
        raise RuntimeError
    assert bars[0].n == 1 and "100%" not in shown()
    assert not layer._forward_hooks


def test_reading_long_files_is_shown(tmp_path, shown, bars, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(1000))
    with reading_progress("reading", [tmp_path / "a", tmp_path / "b"]) as advance:
        advance(500)
        bars[0].start_t -= 2  # as if it had taken so long
        bars[0].last_print_t -= 20
        advance(500)
        assert bars[0].total == 2000 and "reading:  50%" in shown()
    with reading_progress("short", [tmp_path / "a"]) as advance:
        advance(1000)
    assert "short" not in shown()


def test_bars_of_libraries_are_quiet_only_meanwhile(shown):
    with layer_progress([], batches=1):
        before = shown()
        for _ in tqdm.tqdm([1, 2], desc="plain"), tqdm.auto.tqdm([1, 2], desc="auto"):
            list(_)
        assert shown() == before
    list(tqdm.auto.tqdm([1, 2], desc="after"))
    everything = shown()
    assert "after" in everything and "plain" not in everything and "auto" not in everything


def test_quiet_ignores_only_the_warnings_that_are_none():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("Attempting to save a model with offloaded modules", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]


def test_warnings_are_shown_once_and_nothing_below_them(shown):
    log_warnings_once()
    try:
        for _ in range(3):
            logger.info("chatter")
            logger.warning("a module was rounded")
            logger.warning("No accelerator available! Compressing model on CPU instead")
            logger.warning("Disabling tokenizer parallelism due to threading conflict")
        logger.error("worse")
    finally:
        logger.remove()
    assert shown() == "WARNING: a module was rounded\nERROR: worse\n"
