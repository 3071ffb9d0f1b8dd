"""Two ranks with half of the sequences each against one process with all of them."""

import os
import socket
import time
from contextlib import closing
from datetime import timedelta

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
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


def refuse_on_one(rank, port, folders, output):
    """Spoil things on one rank only, and write down what every rank says."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )

    class Indefinite(MaCaModifier):
        """Where it is solved, a Hessian is not positive definite with any dampening."""

        def compress_module_list(self, module_list):
            for module in module_list:
                if self._module_names[module].endswith("layers.0.mlp.down_proj"):
                    self._hessians[module].copy_(-torch.eye(len(self._hessians[module])))
            super().compress_module_list(module_list)

    sequences = random_sequences([24, 12, 40, 13])[rank::RANKS]
    runs = {
        # padding among routed tokens is refused where it is: on rank 0 only
        "routed": ("qwen3_moe", MaCaModifier, 2 - rank),
        "indefinite": ("llama", Indefinite, 1),
    }
    for name, (family, modifier_class, batch_size) in runs.items():
        model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
        modifier = modifier_class(**SCHEME | {"ignore": ["lm_head", "re:.*gate$"]})
        data = loader(sequences, batch_size)
        try:
            oneshot(
                model=model,
                dataset=data,
                recipe=modifier,
                moe_calibrate_all_experts=family != "qwen3_moe",
            )
            said = "nothing"
        except ValueError as error:
            said = str(error)
        (output / f"{name}-{rank}").write_text(said)
        reset_session()
    dist.destroy_process_group()


def test_what_one_rank_refuses_every_rank_does(tiny_models, tmp_path):
    context = multiprocessing.spawn(
        refuse_on_one, (free_port(), folders(tiny_models), tmp_path), nprocs=RANKS, join=False
    )
    try:
        deadline = time.monotonic() + 50
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "a rank waits for one that has failed"
    finally:
        for process in context.processes:
            process.kill()
    for name, says in (
        ("routed", "routed tokens of a padded batch could be padding"),
        ("indefinite", "down_proj: the Hessian is not positive definite with dampening 1"),
    ):
        said = [(tmp_path / f"{name}-{rank}").read_text() for rank in range(RANKS)]
        assert all(says in text for text in said), said
        assert sum(" failed: " in text for text in said) == 1, said
