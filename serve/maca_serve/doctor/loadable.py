"""What vLLM's loader made of a checkpoint's tensors, as findings and at the start of a run."""

import re
from collections.abc import Container, Iterator, Sequence
from typing import Any

from maca_serve.common.console import err
from maca_serve.common.errors import UserError
from maca_serve.doctor.asking import ask
from maca_serve.doctor.checks import Problem
from maca_serve.doctor.headers import Tensor, read_headers
from maca_serve.formats.checkpoint import Checkpoint

_AGAIN = "download or quantize it again"
# vLLM lists the names that it has: one line for each of them is enough.
_UNKNOWN = re.compile(r"There is no module or parameter named '(?P<name>[^']+)'")
_NUMBER = re.compile(r"\b\d+\b")
# What a model computes with; not a head that is the embedding, nor draft layers (speculation).
_COMPUTED_WITH = re.compile(r"(?!lm_head\.|(.*\.)?mtp).*\.(weight|bias|weight_packed|qweight)")


def describe_tensors(tensors: dict[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    """Headers as the worker's question has them."""
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}


def loading_problems(
    found: dict[str, Any], quantized: Container[str] = (), explained: Container[str] = ()
) -> Iterator[Problem]:
    """Findings of `maca_serve.doctor.loading`.

    Args:
        found: its answer.
        quantized: names of the modules that are stored quantized.
        explained: modules of which other findings say what is wrong.
    """
    missing = list(found["missing"])
    for refused in found["refused"]:
        modules = [name.rpartition(".")[0] for name in refused["tensors"]]
        if all(module in explained for module in modules):
            continue
        unknown = _UNKNOWN.search(refused["reason"])
        suffix = refused["tensors"][0].rpartition(".")[2]
        if unknown and not unknown["name"].endswith(f".{suffix}"):
            what = f"the model of config.json has no {_NUMBER.sub('*', unknown['name'])}"
            cure = f"take the config.json that came with these files, or {_AGAIN}"
            yield Problem("error", what, cure, refused["tensors"])
        elif unknown and all(m in quantized for m in modules):
            plain = {f"{module}.weight" for module in modules}
            missing = [name for name in missing if name not in plain]
            what = "vLLM builds it without quantization, and refuses its quantized tensors"
            cure = "leave it out of the recipe (`ignore`)"
            yield Problem("error", what, cure, modules)
        else:
            what = f"vLLM's loader refuses it: {_shorten(refused['reason'])}"
            yield Problem("error", what, _AGAIN, refused["tensors"])
    if missing:
        yield Problem("error", "the model needs it, and the files lack it", _AGAIN, missing)
    if unread := [name for name in found["unread"] if _COMPUTED_WITH.fullmatch(name)]:
        what = "vLLM's model of config.json leaves it out and computes without it"
        yield Problem("warning", what, "take the config.json that came with these files", unread)
    for cut in found["cut"]:
        what = f"is {cut['shape']}, of which the model of config.json would read {cut['read']} only"
        cure = "the sizes in config.json are not those of the tensors: " + _AGAIN
        yield Problem("error", what, cure, [cut["tensor"]])


def require_loadable(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse folders that lack tensors, or have some that vLLM would refuse or read in part.

    Costs as long as importing vLLM, for all of them together.

    Raises:
        UserError: for the first finding of the first such folder.
    """
    safe = [each for each in checkpoints if any(each.path.glob("*.safetensors"))]
    if not safe:
        return
    wanted = [
        {"config": each.config, "tensors": describe_tensors(read_headers(each.path))}
        for each in safe
    ]
    for checkpoint, found in zip(safe, ask({"load": wanted})["loaded"], strict=True):
        if found["unasked"]:
            what = f"{checkpoint.path}: not tried on vLLM's loader: {found['unasked']}"
            err.print(f"warning: {what}", markup=False, soft_wrap=True)
        for problem in loading_problems(found):
            if problem.severity != "error":
                continue
            first, more = problem.modules[0], len(problem.modules) - 1
            others = f" and {more} more" if more else ""
            raise UserError(
                f"{checkpoint.path}: {first}{others}: {problem.what}: {problem.cure}"
                f" (maca-serve doctor {checkpoint.path} says more)"
            )


def _shorten(reason: str) -> str:
    """A loader's error without the list of all that it would take, the same for every layer."""
    unknown = _UNKNOWN.search(reason)
    return _NUMBER.sub("*", unknown[0]) if unknown else reason
