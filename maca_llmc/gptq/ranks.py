"""What several ranks agree on before one of them quantizes a group for all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from maca_llmc.common.errors import CalibrationError
from maca_llmc.gptq.moments import Moments
from maca_llmc.gptq.shared_inputs import Group
from maca_llmc.llmcompressor_api import broadcast_quantized, empty_hessian


def world_size() -> int:
    """How many ranks there are; 1 outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def failing_together() -> Iterator[None]:
    """While open, let no rank go on without one that failed, to wait for it for ever.

    Nothing in the block may wait for other ranks.

    :raises CalibrationError: on the ranks that did not fail, with what the first that did said
    """
    if world_size() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said: list[str | None] = [None] * world_size()
    dist.all_gather_object(said, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(said):
        if message is not None:
            raise CalibrationError(f"rank {rank} failed: {message}")


def agree_on_groups(
    groups: list[Group[Moments]], names: dict[torch.nn.Module, str]
) -> list[Group[Moments]]:
    """Groups that are together on every rank, in the same order on all.

    :param names: of all modules, the same on every rank
    """
    own = [[names[member] for member in group.members] for group in groups]
    everyone: list[list[list[str]]] = [[] for _ in range(world_size())]
    dist.all_gather_object(everyone, own)
    module_of = {name: module for module, name in names.items()}
    group_of = {member: group for group in groups for member in group.members}
    agreed = []
    for together in common_partition(everyone):
        members = [module_of[name] for name in together]
        group = group_of.get(members[0])
        if group is None:
            moments = Moments.onto(empty_hessian(members[0]), asymmetric=False)
        elif len(group.members) == len(members):
            moments = group.statistic
        else:
            moments = group.statistic.copy()  # each part is reduced by itself
        agreed.append(Group(members, moments))
    return agreed


def common_partition(partitions: list[list[list[str]]]) -> list[list[str]]:
    """What is together in every partition, as names in sorted order.

    :param partitions: per rank, its groups of module names; a module may be missing on a rank
    """
    group_of = [
        {name: index for index, group in enumerate(partition) for name in group}
        for partition in partitions
    ]
    together: dict[tuple[int | None, ...], list[str]] = {}
    for name in sorted({name for found in group_of for name in found}):
        together.setdefault(tuple(found.get(name) for found in group_of), []).append(name)
    return list(together.values())


def agree_on_scale(
    hessians: list[torch.Tensor], reference: int | None, weighted: bool, exponent: float
) -> tuple[int, bool]:
    """Put the Hessians of all ranks on one scale, in place, before they are added up.

    :param reference: this rank's length of weight 1; None when it saw no sequence
    :param weighted: whether this rank's tokens weigh differently
    :param exponent: of the weight
    :return: reference and ``weighted`` for all ranks together
    """
    own = reference or 0
    agreed = torch.tensor([own, weighted], device=hessians[0].device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    shared = int(agreed[0])
    factor = (own / shared) ** -exponent if own else 1.0
    # a rank whose own lengths are all alike does not know that another rank's differ
    rescaled = torch.tensor([factor != 1.0 or bool(agreed[1])], device=agreed.device).int()
    dist.all_reduce(rescaled, op=dist.ReduceOp.MAX)
    if factor != 1.0:
        for hessian in hessians:
            hessian *= factor
    return shared, bool(rescaled)


def broadcast_followers(
    groups: Iterable[Group[Moments]], rank_of: dict[torch.nn.Module, int]
) -> None:
    """Send what a rank quantized beside the first module of its groups.

    :param rank_of: by first module, whose it was
    """
    followers = {
        member: rank_of[group.members[0]] for group in groups for member in group.members[1:]
    }
    broadcast_quantized(followers)
    # on the CPU ranks share the weights in memory, and llm-compressor does not wait there until
    # all are written
    dist.barrier()
