"""A device that is none: tensors say that they are on it and refuse to meet those of the CPU.

Values are computed on the CPU, so that results can be compared. What shows is what a GPU would
refuse, and every branch that is not the CPU's. Not what CUDA computes, nor how fast.

Of no use outside of a process of its own (:class:`Elsewhere`): torch keeps what was made up.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.weak import WeakIdKeyDictionary

NAME = "pretend"
BETWEEN_DEVICES = {"aten::_to_copy", "aten::copy_", "aten::is_same_size"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operators that take tensors of two devices, the second kind only as indices."""

_values = WeakIdKeyDictionary()


class _There(torch.Tensor):
    """A tensor without storage; its values are in ``_values``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor on {NAME}, outside of pretending()")


def is_there(value):
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _put_there(values):
    tensor = torch.Tensor._make_wrapper_subclass(
        _There,
        values.shape,
        strides=values.stride(),
        storage_offset=values.storage_offset(),
        dtype=values.dtype,
        device=torch.device(NAME, 0),
    )
    _values[tensor] = values
    return tensor


class _Computing(TorchDispatchMode):
    """Compute on the CPU what is asked of the device, and count it by operator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(map(is_there, tensors))
        if there and name not in BETWEEN_DEVICES:
            _refuse_strangers(name, tensors)
        to_there = is_there(args[0]) if name == "aten::copy_" else there
        if (device := kwargs.get("device")) is not None:
            to_there = torch.device(device).type == NAME
            kwargs["device"] = torch.device("cpu") if to_there else device
        self.counts[name] += there
        wrapped = {}

        def unwrap(value):
            if not is_there(value):
                return value
            wrapped[id(_values[value])] = value
            return _values[value]

        def wrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in wrapped:  # changed in place
                return wrapped[id(value)]
            return _put_there(value) if to_there else value

        with _disable_current_modes():
            result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        return tree_map(wrap, result)


def _refuse_strangers(name, tensors):
    strangers = [x for x in tensors if not is_there(x) and x.ndim]
    if name in INDEXING:
        strangers = [x for x in strangers if x.is_floating_point()]
    if strangers:
        described = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{name}: tensors on two devices: {described}")


class _Making(TorchFunctionMode):
    """What torch does beside its dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.data_ptr and is_there(args[0]):
            return _values[args[0]].data_ptr()
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func == torch.Tensor.data.__set__ and is_there(args[1]):
            if not is_there(args[0]):
                return func(args[0], _values[args[1]])
            _values[args[0]] = _values[args[1]]
            return None
        return func(*args, **kwargs)


@contextmanager
def pretending() -> Iterator[Counter]:
    """While open there is the device; how often each operator has run on it."""
    with _Making(), _Computing() as computing:
        yield computing.counts


class Elsewhere:
    """Runs functions on the device, whatever they were told, in one process of its own."""

    def __init__(self):
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __call__(self, function, *args, **kwargs):
        """What ``function`` returns, and how often each operator has run on the device."""
        return self._pool.submit(_run, function, args, kwargs).result()

    def close(self):
        self._pool.shutdown()


def _run(function, args, kwargs):
    from maca_llmc.calibrate import hidden_states
    from maca_llmc.evaluation import divergence
    from maca_llmc.gptq import stacks
    from maca_llmc.run import prepare

    if not hasattr(torch, NAME):
        torch.set_num_threads(1)
        _setup_privateuseone_for_python_backend(NAME)
    device = mock.Mock(return_value=torch.device(NAME, 0))
    put = hidden_states.HiddenStates.put

    def put_where_told(self, key, hidden):
        put(self, key, hidden)
        there = self.device.type == NAME
        assert all(is_there(held) == there for held in self._held.values()), (
            "not where told to wait"
        )

    update = stacks.gptq_block_update

    def update_as_on_cuda(block, *tensors, scale, **given):
        assert not (is_there(block) and (scale < 0).any()), "CUDA's kernel takes these for zero"
        update(block, *tensors, scale=scale, **given)

    with (
        mock.patch.object(stacks, "gptq_block_update", update_as_on_cuda),
        mock.patch.object(prepare, "resolve_device", device),
        mock.patch.object(divergence, "resolve_device", device),
        mock.patch.object(hidden_states.HiddenStates, "put", put_where_told),
        pretending() as counts,
    ):
        return function(*args, **kwargs), counts
