"""The sampled sensitivity against the exact expectation, in float64."""

import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from maca_llmc.llmcompressor_api import decoder_layers
from maca_llmc.tuning.sensitivity import FIRST, OTHERS, channel_sensitivity

WINDOW = torch.tensor([1, 7, 30, 4, 12])
DRAWS = 2000


def exact(model, layer):
    """``E_a[(d log p(a) / d y)^2]``, summed over the tokens that answer, by token and channel.

    Answers at different tokens are independent and their scores have no mean, so that the square of
    the sum is the sum of the squares.
    """
    kept = []
    handle = layer.register_forward_hook(
        lambda _module, _args, output: kept.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    embedded = model.get_input_embeddings()(WINDOW[None]).detach().requires_grad_()
    logs = model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
    handle.remove()
    total = torch.zeros_like(kept[0][0])
    for row in logs:
        for log in row:
            (score,) = torch.autograd.grad(log, kept[0], retain_graph=True)
            total += log.exp().detach() * score[0].square()
    return total


def test_sampled_sensitivity_is_the_fisher_diagonal(tmp_path):
    folder = save_tiny_model("llama", tmp_path, vocab_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    layers = decoder_layers(model)
    found = channel_sensitivity(model, layers, [WINDOW] * DRAWS, DRAWS * len(WINDOW), seed=0)
    for layer, sampled in zip(layers, found, strict=True):
        fisher = exact(model, layer)
        fisher = torch.stack([fisher[0], fisher[1:].mean(0)])
        expected = (fisher / fisher[OTHERS].mean()).float()
        assert sampled.shape == expected.shape
        for row in (FIRST, OTHERS):
            error = (sampled[row] - expected[row]).norm() / expected[row].norm()
            assert error < 0.1
    assert not any(hook for layer in layers for hook in layer._forward_hooks)
