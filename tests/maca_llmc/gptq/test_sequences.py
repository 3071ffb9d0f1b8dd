import pytest
import torch

from maca_llmc.gptq.sequences import BatchLayout, module_tokens, split_sequences, valid_tokens

MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])


def four_dimensional(window, additive):
    """Causal mask with padding, as eager (additive) and sdpa (bool) attention get it."""
    distance = torch.arange(4)[:, None] - torch.arange(4)[None, :]
    allowed = (distance >= 0) & (distance < window)
    allowed = allowed[None] & MASK.bool()[:, None, :]
    if not additive:
        return allowed[:, None]
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK.bool()]
    + [four_dimensional(window, additive) for window in (2, 4) for additive in (True, False)],
    ids=["2d", "2d bool", "sliding eager", "sliding sdpa", "eager", "sdpa"],
)
def test_padding_is_read_from_every_kind_of_mask(mask):
    assert torch.equal(valid_tokens(mask), MASK.bool())


def test_no_padding_is_none():
    assert valid_tokens(None) is None
    assert valid_tokens(torch.ones(2, 3)) is None


def test_a_mask_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="eager, sdpa or flash"):
        valid_tokens("block mask")


def test_rows_come_back_without_padding_also_when_flattened():
    tokens = torch.arange(24.0).reshape(3, 4, 2)
    layout = BatchLayout((3, 4), MASK.bool())
    expected = [tokens[0], tokens[1, 2:], tokens[2, :3]]
    for given in (tokens, tokens.reshape(12, 2)):
        for row, wanted in zip(split_sequences(given, layout), expected, strict=True):
            assert torch.equal(row, wanted)
    assert layout.lengths == [4, 2, 3]


def test_routed_tokens_cannot_be_mapped():
    assert split_sequences(torch.zeros(5, 2), BatchLayout((3, 4), None)) is None


def test_inputs_of_other_proportions_are_taken_whole():
    rows = split_sequences(torch.ones(2, 9, 2), BatchLayout((3, 4), MASK.bool()))
    assert [row.shape[0] for row in rows] == [9, 9]


def test_outside_of_a_batch_two_dimensions_are_one_sequence():
    assert [row.shape for row in split_sequences(torch.ones(7, 2), None)] == [(7, 2)]


def test_a_row_of_padding_only_is_left_out():
    layout = BatchLayout((2, 3), torch.tensor([[True] * 3, [False] * 3]))
    assert len(split_sequences(torch.ones(2, 3, 4), layout)) == 1


def test_a_convolution_is_unfolded_to_what_its_weight_multiplies():
    conv = torch.nn.Conv2d(3, 5, 2, stride=2, bias=False)
    images = torch.randn(2, 3, 4, 6)
    rows = module_tokens(conv, images)
    output = rows @ conv.weight.reshape(5, -1).T
    expected = conv(images).flatten(2).transpose(1, 2)
    assert torch.allclose(output, expected, atol=1e-6)
