"""Which modules receive the same tensors, so that one statistic serves them all.

q, k and v share an input, gate and up do, and so do the experts of a layer when all of them see
every token. That is found here from the tensors themselves, not from names: modules are together
for as long as every input of one has been an input of the others too.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from maca_llmc.common.errors import CalibrationError

Statistic = TypeVar("Statistic")


@dataclass(frozen=True)
class Input:
    """What a module received, and what it takes to read it.

    :param tensor: as the module got it; not to be changed in place while it is needed
    :param context: passed through, for whoever adds the input to a statistic
    """

    tensor: torch.Tensor
    context: Any = None
    version: int | None = field(init=False)

    def __post_init__(self) -> None:
        """Note what the tensor is now."""
        object.__setattr__(self, "version", version_of(self.tensor))

    @property
    def is_changed(self) -> bool:
        """Whether the tensor was written to since the module received it."""
        return version_of(self.tensor) != self.version


@dataclass(eq=False)
class Group(Generic[Statistic]):
    """Modules that have received the same inputs so far, and the statistic of these.

    :param members: in the order in which they first received something
    """

    members: list[torch.nn.Module]
    statistic: Statistic
    pending: Input | None = None
    arrived: set[torch.nn.Module] = field(default_factory=set)
    founding: "Founding | None" = None


class Founding:
    """A group's first and so far only input: whoever receives it too may join.

    Holds the tensor weakly: once it is gone, nobody can receive it any more.
    """

    def __init__(self, tensor: torch.Tensor, module: torch.nn.Module) -> None:
        self.tensor = weakref.ref(tensor)
        self.key = _identity(tensor, module)

    def is_input_of(self, tensor: torch.Tensor, module: torch.nn.Module) -> bool:
        """Whether ``tensor`` is the founding one, not merely at an address used again."""
        return self.tensor() is not None and self.key == _identity(tensor, module)


class SharedInputs(Generic[Statistic]):
    """Keep one statistic for each set of modules that receive the same tensors.

    An input of a group is held until all of its members have received it, then added once. When
    some did not (a router chose), the group splits and nobody counts what it did not receive: each
    module's statistic is exactly that of its own inputs, shared or not.

    :param start: makes an empty statistic for a module
    :param add: adds an input to a statistic; gets the modules that received it too
    :param copy: copies a statistic
    """

    def __init__(
        self,
        start: Callable[[torch.nn.Module], Statistic],
        add: Callable[[list[torch.nn.Module], Statistic, Input], None],
        copy: Callable[[Statistic], Statistic],
    ) -> None:
        self._start, self._add, self._copy = start, add, copy
        self._group_of: dict[torch.nn.Module, Group[Statistic]] = {}
        self._open: dict[Hashable, Group[Statistic]] = {}

    def receive(self, module: torch.nn.Module, given: Input) -> None:
        """Count one input of ``module``."""
        group = self._group_of.get(module)
        if group is None:
            self._join_or_found(module, given)
            return
        self._close(group)
        if group.pending is None:
            group.pending, group.arrived = given, {module}
        elif module not in group.arrived and _same(group.pending.tensor, given.tensor):
            group.arrived.add(module)
        else:
            self._settle(group)
            self.receive(module, given)
            return
        if len(group.arrived) == len(group.members):
            self._settle(group)

    def take(self) -> list[Group[Statistic]]:
        """All groups, each with its statistic complete; starts anew."""
        for group in list(self._groups()):
            self._settle(group)
        groups = list(self._groups())
        self._group_of.clear()
        self._open.clear()
        return groups

    def _groups(self) -> Iterator[Group[Statistic]]:
        yield from {id(group): group for group in self._group_of.values()}.values()

    def _join_or_found(self, module: torch.nn.Module, given: Input) -> None:
        group = self._open.get(_identity(given.tensor, module))
        if group is not None and group.founding is not None:
            if group.founding.is_input_of(given.tensor, module):
                group.members.append(module)
                self._group_of[module] = group
                return
            self._close(group)
        founding = Founding(given.tensor, module)
        group = Group([module], self._start(module), founding=founding)
        self._group_of[module] = self._open[founding.key] = group
        self._add(group.members, group.statistic, given)

    def _close(self, group: Group[Statistic]) -> None:
        if group.founding is not None:
            self._open.pop(group.founding.key, None)
            group.founding = None

    def _settle(self, group: Group[Statistic]) -> None:
        if group.pending is None:
            return
        missed = [member for member in group.members if member not in group.arrived]
        if missed:
            apart = Group(missed, self._copy(group.statistic))
            self._group_of.update(dict.fromkeys(missed, apart))
            group.members = [member for member in group.members if member in group.arrived]
        given, group.pending = group.pending, None
        self._add(group.members, group.statistic, given)


def changed_in_place(name: str) -> CalibrationError:
    """What to raise where the input of a module is no longer what it received."""
    return CalibrationError(
        f"the input of {name} is written to in place before all modules have received it, so that "
        "they cannot be told apart: have the model make a new tensor there"
    )


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor, or what it is a view of, was written to in place; None where untold."""
    return None if tensor.is_inference() else tensor._version


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors that are both alive are the same memory, read the same way."""
    return one is other or _address(one) == _address(other)


def _address(tensor: torch.Tensor) -> Hashable:
    where = id(tensor) if tensor.is_meta else tensor.data_ptr()
    kind = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    return where, *kind, version_of(tensor)


def _identity(tensor: torch.Tensor, module: torch.nn.Module) -> Hashable:
    # a convolution reads its input through its own kernel: no other module reads it the same way
    reader = None if isinstance(module, torch.nn.Linear) else module
    return reader, _address(tensor)
