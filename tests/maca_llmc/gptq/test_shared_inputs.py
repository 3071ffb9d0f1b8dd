"""Against what each module received, kept one by one."""

import random

import pytest
import torch

from maca_llmc.gptq.shared_inputs import Input, SharedInputs


def lists_of_inputs():
    """Shared inputs whose statistic is the list of all tensors in it."""
    return SharedInputs(
        start=lambda module: [],
        add=lambda modules, statistic, given: statistic.append(given.tensor.clone()),
        copy=list,
    )


def modules(count):
    return [torch.nn.Linear(4, 4) for _ in range(count)]


def members_of(groups):
    return [group.members for group in groups]


def test_modules_of_the_same_tensors_are_together():
    q, k, o = modules(3)
    shared = lists_of_inputs()
    for _ in range(3):
        both, other = torch.randn(2, 4), torch.randn(2, 4)
        for module, tensor in ((q, both), (k, both), (o, other)):
            shared.receive(module, Input(tensor))
    groups = shared.take()
    assert members_of(groups) == [[q, k], [o]]
    assert [len(group.statistic) for group in groups] == [3, 3]
    assert shared.take() == []


def test_another_view_of_the_same_memory_is_the_same_input():
    q, k = modules(2)
    shared, tensor = lists_of_inputs(), torch.randn(2, 3, 4)
    first, second = tensor.reshape(6, 4), tensor.reshape(6, 4)
    shared.receive(q, Input(first))
    shared.receive(k, Input(second))
    assert members_of(shared.take()) == [[q, k]]


def test_equal_values_elsewhere_are_another_input():
    q, k = modules(2)
    shared, tensor = lists_of_inputs(), torch.randn(2, 4)
    copy = tensor.clone()
    shared.receive(q, Input(tensor))
    shared.receive(k, Input(copy))
    assert members_of(shared.take()) == [[q], [k]]


def test_a_tensor_changed_in_place_is_another_input():
    q, k = modules(2)
    shared, tensor = lists_of_inputs(), torch.randn(2, 4)
    shared.receive(q, Input(tensor))
    tensor += 1
    shared.receive(k, Input(tensor))
    assert members_of(shared.take()) == [[q], [k]]


def test_an_input_that_waits_knows_when_it_is_changed():
    q, k = modules(2)
    seen = []
    shared = SharedInputs(lambda m: [], lambda m, s, given: seen.append(given.is_changed), list)
    for change in (False, True):
        tensor = torch.randn(2, 4)
        shared.receive(q, Input(tensor))
        if change:
            tensor += 1
        shared.receive(k, Input(tensor))
    shared.take()
    assert seen == [False, True]


def test_memory_used_again_is_another_input():
    q, k = modules(2)
    shared = lists_of_inputs()
    tensor = torch.randn(2, 4)
    storage = tensor.untyped_storage()  # keeps the address in use
    shared.receive(q, Input(tensor))
    del tensor
    again = torch.empty(0).set_(storage, 0, (2, 4))
    shared.receive(k, Input(again))
    assert members_of(shared.take()) == [[q], [k]]


def test_meta_tensors_are_told_apart():
    q, k, o = modules(3)
    shared = SharedInputs(lambda m: [], lambda m, s, g: s.append(g), list)
    both, other = torch.empty(2, 4, device="meta"), torch.empty(2, 4, device="meta")
    for module, tensor in ((q, both), (k, both), (o, other)):
        shared.receive(module, Input(tensor))
    assert members_of(shared.take()) == [[q, k], [o]]


def test_convolutions_share_with_nobody():
    one, other = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 2)
    shared, tensor = lists_of_inputs(), torch.randn(1, 1, 4, 4)
    shared.receive(one, Input(tensor))
    shared.receive(other, Input(tensor))
    assert members_of(shared.take()) == [[one], [other]]


@pytest.mark.parametrize("seed", range(40))
def test_each_module_has_what_it_received_whatever_the_order(seed):
    """Random calls: missing ones, repeated ones, shared by some, in batches or not."""
    chance = random.Random(seed)
    everyone = modules(5)
    shared, expected = lists_of_inputs(), {module: [] for module in everyone}
    for number in range(12):
        tensors = [torch.full((1,), 10.0 * number + k) for k in range(2)]
        calls = [
            (module, tensors[chance.random() < 0.2]) for module in everyone if chance.random() < 0.9
        ]
        if chance.random() < 0.2:
            chance.shuffle(calls)
        if chance.random() < 0.2:
            calls += calls[:1]
        for module, tensor in calls:
            shared.receive(module, Input(tensor))
            expected[module].append(float(tensor))
    groups = shared.take()
    found = {m: group.statistic for group in groups for m in group.members}
    assert sum(len(group.members) for group in groups) == len(found)
    for module, values in expected.items():
        assert [float(value) for value in found.get(module, [])] == values
