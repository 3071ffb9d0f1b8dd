"""Flags that `maca-serve up DIR -- FLAGS` hands on to vLLM as they are."""

from collections.abc import Sequence

from maca_serve.common.errors import UserError

# What maca-serve sets itself and relies on, and the option of its own to use instead.
_OWN = {
    "--host": "--host",
    "--port": "--port",
    "--api-key": "VLLM_API_KEY in the environment",
    "--max-model-len": "--max-model-len",
    "--tensor-parallel-size": "--tp",
    "-tp": "--tp",
    "--pipeline-parallel-size": "--pp",
    "-pp": "--pp",
    "--model": "DIR",
    "--served-model-name": "the folder's name",
    "--uds": "--host and --port",
    "--ssl-keyfile": "a proxy that speaks TLS",
    "--ssl-certfile": "a proxy that speaks TLS",
}
# What would serve otherwise than maca-serve says, and past its key.
_REFUSED = {
    "--config": "the file may set what maca-serve sets; give its flags here",
    "--grpc": "maca-serve serves HTTP",
    "--grpc-port": "a key closes HTTP only",
    "--headless": "nothing would be served",
}


def check_flags(flags: Sequence[str]) -> list[str]:
    """The flags, none of which is one that maca-serve sets; vLLM itself refuses unknown ones.

    Raises:
        UserError: a word where a flag should be, a flag that has its own option here, or one with
            which something else than the server that maca-serve describes would run.
    """
    if flags and not flags[0].startswith("-"):
        raise UserError(f"{flags[0]!r}: give one DIR; flags for vLLM follow `--`")
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        for own, instead in _OWN.items():
            if _means(name, own):
                cure = "put it" if instead == own else f"use {instead}"
                where = " before the `--`" if instead.startswith("--") else ""
                raise UserError(f"{flag}: maca-serve sets {own} of vLLM itself; {cure}{where}")
        for other, why in _REFUSED.items():
            if _means(name, other):
                raise UserError(f"{flag}: cannot be passed on: {why}")
    return list(flags)


def _means(name: str, flag: str) -> bool:
    """Whether vLLM would take a name for the flag, as it does abbreviations: --por is --port."""
    return name == flag or (len(name) > 2 and name.startswith("--") and flag.startswith(name))
