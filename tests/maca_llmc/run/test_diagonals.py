"""Hessian diagonals by length."""

import json

import pytest
import torch
from llmcompressor import oneshot
from tiny import loader, random_sequences

from maca_llmc import MaCaModifier
from maca_llmc.gptq.sequences import module_tokens
from maca_llmc.run.diagonals import DIAGONALS_FILE, DiagonalRecorder, inspected_modules


def test_a_diagonal_is_the_mean_over_sequences_of_the_mean_square():
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(length, 3, generator=generator) for length in (2, 4, 3, 9, 5)]
    recorder = DiagonalRecorder(["a"], [8, 4])
    for sequence in sequences:
        recorder.add("a", sequence)
        recorder.add("b", sequence)
    found = recorder.diagonals()

    def diagonal(sequence):  # of the Hessian of one sequence, normalised by its length
        rows = sequence.double()
        return torch.diagonal(rows.T @ rows) / len(rows)

    short, long = (sequences[:3], sequences[3:])  # up to 4; up to 8 and beyond
    assert found.keys() == {"a"} and list(found["a"]) == [4, 8]
    for length, group in ((4, short), (8, long)):
        expected = sum(diagonal(sequence) for sequence in group) / len(group)
        assert torch.allclose(found["a"][length].double(), expected, rtol=1e-6)


def test_what_is_saved_reads_back(tmp_path):
    recorder = DiagonalRecorder(["m"], [4])
    recorder.add("m", torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    recorder.save(tmp_path)
    assert json.loads((tmp_path / DIAGONALS_FILE).read_text()) == {
        "lengths": [4],
        "modules": {"m": {"4": [5.0, 2.0]}},
    }


def test_nothing_seen_writes_nothing(tmp_path):
    DiagonalRecorder(["m"], [4]).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("batch_size", "side"), [(1, "right"), (3, "left")])
def test_the_modifier_records_each_sequence_without_its_padding(tiny_model, batch_size, side):
    lengths = [8, 20, 5, 16, 7]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    model = tiny_model("llama", num_hidden_layers=1)
    rows = {name: {8: [], 16: [], 32: []} for name in names}

    def keep(name):
        def hook(module, args):
            tokens = module_tokens(module, args[0])[0]
            rows[name][next(s for s in (8, 16, 32) if len(tokens) <= s)].append(tokens.double())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    sequences = random_sequences(lengths)
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=sequence[None])
    for handle in handles:
        handle.remove()

    recorder = DiagonalRecorder(names, [8, 16, 32])
    modifier = MaCaModifier(scheme="W8A8", targets=["re:.*(q|down)_proj"])
    modifier.record_diagonals(recorder)
    oneshot(model=model, dataset=loader(sequences, batch_size, side), recipe=modifier)
    for name, by_length in recorder.diagonals().items():
        assert list(by_length) == [8, 16, 32]
        for length, found in by_length.items():
            expected = sum(x.square().mean(0) for x in rows[name][length]) / len(rows[name][length])
            assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-9), (name, length)
    assert recorder.diagonals().keys() == set(names)


def test_a_first_middle_and_last_layer_are_inspected():
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{kind}" for layer in range(12) for kind in kinds]
    assert inspected_modules(names) == [
        f"model.layers.{layer}.{kind}" for layer in (0, 6, 11) for kind in kinds if "v_" not in kind
    ]
    assert inspected_modules(["a", "b", "c", "d"]) == ["a", "b", "c"]
    assert inspected_modules([]) == []
