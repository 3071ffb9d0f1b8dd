"""Two ranks with half of the sequences each against one process with all of them."""

import os
import socket
import time
from contextlib import closing
from datetime import timedelta

import pytest
import torch
from llmcompressor import oneshot
from tiny import loader, random_sequences
from torch import distributed as dist
from torch import multiprocessing
from transformers import AutoModelForCausalLM
from watching import SCHEME, hessians_of

from maca_llmc import MaCaModifier

RANKS = 2
TIMEOUT = timedelta(seconds=60)

CASES = {
    "first lengths differ": ("llama", 1.0, [24, 5, 40, 13], [8]),
    "alike on each rank": ("llama", 1.0, [24, 12, 24, 12], None),
    "GPTQ": ("llama", 0.0, [24, 5, 40, 13], None),
    "routed experts": ("qwen3_moe", 1.0, [24, 1, 40, 1], None),
}
"""Family, exponent, lengths (even ones go to rank 0, odd ones to rank 1), nested scales.

In the last one, experts get routed tokens only: some of them none at all on rank 1.
"""


class Watched(MaCaModifier):
    """Keeps what it is about to quantize, reduced over ranks."""

    def compress_module_list(self, module_list):
        found = hessians_of(self, module_list)
        assert len(found) == sum(len(self._groups[first].members) for first in module_list)
        self._found.update(found)
        super().compress_module_list(module_list)


def calibrate(folders, case, rank=None):
    """Hessians (of the modules this process quantizes) and quantized weights (of all)."""
    torch.set_num_threads(1)
    family, exponent, lengths, scales = CASES[case]
    sequences = random_sequences(lengths)
    if rank is not None:
        sequences = sequences[rank::RANKS]
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    routed = family == "qwen3_moe"
    # a routed expert's few tokens leave directions that only the dampening gives a cost: scales
    # that cost nearly the same there may be chosen by the last bit of a sum
    fields = {"length_exponent": exponent, "nested_scales": scales, "hessian_scales": not routed}
    modifier = Watched(**SCHEME, **fields)
    object.__setattr__(modifier, "_found", {})
    modifier.ignore.append(r"re:.*mlp\.gate$")
    data = loader(sequences)
    oneshot(model=model, dataset=data, recipe=modifier, moe_calibrate_all_experts=not routed)
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    return {"hessians": modifier._found, "weights": weights}


def work(rank, port, folders, cases, output):
    os.environ["HF_HUB_OFFLINE"] = "1"
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    for index, case in enumerate(cases):
        torch.save(calibrate(folders, case, rank), output / f"{index}-{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def folders(tiny_models):
    return {family: str(tiny_models(family)) for family, *_ in CASES.values()}


@pytest.fixture(scope="module")
def both_ranks(tiny_models, tmp_path_factory):
    """Results of both ranks by case, out of one pair of processes."""
    output = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.spawn(
        work, (free_port(), folders(tiny_models), list(CASES), output), nprocs=RANKS, join=False
    )
    try:
        deadline = time.monotonic() + 120
        while not context.join(timeout=5):  # returns when any one ends, raises what it raised
            assert time.monotonic() < deadline, "the two ranks did not come to an end"
    finally:
        for process in context.processes:
            process.kill()
    return {
        case: [torch.load(output / f"{index}-{rank}.pt") for rank in range(RANKS)]
        for index, case in enumerate(CASES)
    }


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_quantize_as_one_process(tiny_models, both_ranks, case):
    """Exactly so in layer 0, where a rounding tie cannot yet have moved the inputs."""
    alone = calibrate(folders(tiny_models), case)
    ranks = both_ranks[case]
    shared = ranks[0]["hessians"] | ranks[1]["hessians"]
    assert shared.keys() == alone["hessians"].keys() == alone["weights"].keys()
    assert not ranks[0]["hessians"].keys() & ranks[1]["hessians"].keys()
    assert all(len(rank["hessians"]) >= 4 for rank in ranks), "one rank did all the work"
    factor = None  # the common one: which length weighs 1 is up to the ranks
    for name, hessian in shared.items():
        expected = alone["hessians"][name]
        if not expected.any():
            assert not hessian.any(), name
            continue
        if factor is None:
            factor = hessian.trace() / expected.trace()
        error = torch.linalg.norm(hessian / factor - expected) / torch.linalg.norm(expected)
        assert error < (1e-5 if ".layers.0." in name else 2e-2), (name, float(error))
    for name, weight in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        if ".layers.0." in name:
            same = (ranks[0]["weights"][name] == weight).float().mean()
            assert same > 0.99, f"{name}: more than rounding ties differ"
    if case == "GPTQ":
        assert factor == pytest.approx(1.0)
    for kinds in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        owners = {}
        for name in shared:
            stem, _, kind = name.rpartition(".")
            if kind in kinds:
                owners.setdefault(stem, set()).add(name in ranks[0]["hessians"])
        assert owners and all(len(owner) == 1 for owner in owners.values()), "a group was parted"
