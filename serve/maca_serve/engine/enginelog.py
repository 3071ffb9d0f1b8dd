"""Reading vLLM's log: which kernel it chose, and why it died."""

import re

# `Using MarlinLinearKernel for CompressedTensorsWNA16`, `Using X for mixed-precision linear`,
# `Using X for NVFP4 GEMM`, `Selected CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8`.
_KERNEL = re.compile(
    r"(?:Using|Selected) (?P<kernel>\w+) for "
    r"(?:\w*(?:CompressedTensors|LinearMethod)\w*|mixed-precision linear|MXFP\d GEMM|NVFP4 GEMM)"
)
# `Using 'CPU' WNA16 MoE backend.`, `Using CPU Int8 MoE backend out of potential backends: [...].`
_EXPERTS = re.compile(r"Using '?(?P<backend>\w+)'? (?!Unquantized)\w+(?: \w+)? MoE backend")
_WEIGHTS = re.compile(r"Model loading took (?P<gib>[\d.]+) GiB")
_DTYPE = re.compile(r"Initializing a V1 LLM engine .*?\bdtype=torch\.(?P<dtype>\w+)")
# With CUDA the first is what the profiling run left, on a CPU it is what was asked for.
_CACHE_BYTES = re.compile(
    r"(?:Available KV cache memory: (?P<cuda>[\d.]+) GiB"
    r"|set \((?P<cpu>[\d.]+)/[\d.]+\) GiB for KV cache)"
)
_CACHE_TOKENS = re.compile(r"KV cache size: (?P<tokens>[\d,]+) tokens")
_PREFIX = re.compile(r"^\([\w\- ]+pid=\d+\) (?:(?:ERROR|INFO|WARNING) [\d\- :]+\[[^]]+\] ?)?")
_ERROR = re.compile(r"^(?:[\w.]+\.)?(?P<type>\w+(?:Error|Exception)): (?P<message>.+)")
# A child that was killed, for instance by the kernel for want of memory, has no exception.
_KILLED = re.compile(r"^(?P<message>Worker proc \S+ died unexpectedly[^,]*)")
# What the server says of an engine that ended without a word of its own; most such were killed.
_CORE_GONE = "engine core exited unexpectedly"
# What gcc says of an extension that is built when it is first used, before Python names the call.
_COMPILER = re.compile(r"^\S+:\d+:\d+: fatal error: (?P<message>.+)")
# A flag that vLLM does not know, or a value that it does not take.
_USAGE = re.compile(r"^[\w.\- ]+: error: (?P<message>.+)")
# Python's farewell in every stopped engine's log; it says nothing about why it stopped.
_NOISE = ("resource_tracker", "warnings.warn(", "nanobind", " - leaked ", " - ... skipped")
_TAIL_WIDTH = 300
# What the parent processes say about a child's error, whose own line stands earlier.
_SECOND_HAND = ("Engine core initialization failed", "Worker failed with error", "EngineCore")
# What the other end of a connection sees of a death, or of a client that went away before it.
_DISCONNECTED = ("ConnectionResetError", "ConnectionAbortedError", "BrokenPipeError")


def find_kernels(lines: list[str]) -> list[str]:
    """Linear kernels that vLLM named in its log, each once, in order of appearance."""
    found = (_KERNEL.search(line) for line in lines)
    return list(dict.fromkeys(match["kernel"] for match in found if match))


def find_experts(lines: list[str]) -> list[str]:
    """Backends of quantized experts in vLLM's log, `CPU experts`, each once, in order."""
    found = (_EXPERTS.search(line) for line in lines)
    return list(dict.fromkeys(name_experts(match["backend"]) for match in found if match))


def name_experts(backend: str) -> str:
    """What runs a layer of experts: vLLM's log does not always name the class."""
    return f"{backend} experts"


def find_weights_memory(lines: list[str]) -> int | None:
    """Bytes that the weights take on the device, None where the log does not say.

    Its GiB have two decimals. vLLM's CPU engine says nothing.
    """
    found = (_WEIGHTS.search(line) for line in lines)
    return next((round(float(match["gib"]) * 1024**3) for match in found if match), None)


def find_dtype(lines: list[str]) -> str | None:
    """The dtype that the engine computes in, e.g. `bfloat16`, None where the log does not say."""
    found = (_DTYPE.search(line) for line in lines)
    return next((match["dtype"] for match in found if match), None)


def find_cache(lines: list[str]) -> tuple[int | None, int | None]:
    """Bytes of the KV cache and the tokens it holds, None where the log does not say."""
    sizes = [match["cuda"] or match["cpu"] for match in map(_CACHE_BYTES.search, lines) if match]
    tokens = [match["tokens"] for match in map(_CACHE_TOKENS.search, lines) if match]
    return (
        round(float(sizes[0]) * 1024**3) if sizes else None,
        int(tokens[0].replace(",", "")) if tokens else None,
    )


def find_cause(lines: list[str]) -> str | None:
    """The first exception that is not second-hand, as `Type: message`, or None.

    A killed worker counts as one, and so does a flag that vLLM does not take; an engine that is
    gone, or else a broken connection, only where nothing else is named.
    """
    stripped = [_PREFIX.sub("", line).strip() for line in lines]
    gone = any(_CORE_GONE in line for line in stripped)
    compiler = next(filter(None, map(_COMPILER.match, stripped)), None)
    disconnected = None
    for number, line in enumerate(stripped):
        if plain := _KILLED.match(line) or _USAGE.match(line):
            return plain["message"]
        match = _ERROR.match(line)
        if match is None or any(match["message"].startswith(word) for word in _SECOND_HAND):
            continue
        message = match["message"]
        if match["type"] == "ValidationError" and number + 1 < len(stripped):
            # pydantic's first line only counts the errors; the next ones name them.
            message = " ".join(stripped[number + 1 : number + 3])
        if match["type"] == "CalledProcessError" and compiler:
            message = f"the compiler said {compiler['message']!r}"
        cause = f"{match['type']}: {message}"
        if match["type"] not in _DISCONNECTED:
            return cause
        disconnected = disconnected or cause
    if gone:
        return f"{_CORE_GONE} and named no error: killed, as Linux does when memory runs out?"
    return disconnected


def tail(lines: list[str], count: int) -> list[str]:
    """The last lines with something to say, cut where vLLM dumps whole requests into one."""
    telling = [line for line in lines if line.strip() and not any(n in line for n in _NOISE)]
    return [line[:_TAIL_WIDTH] for line in telling[-count:]]


def last_message(lines: list[str]) -> str:
    """The last line with something to say, without its prefix: what the engine is doing now."""
    for line in reversed(lines):
        text = _PREFIX.sub("", line).strip()
        if text:
            return text[:60]
    return ""
