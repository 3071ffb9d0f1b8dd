"""The answer to one question about kernels; runs in the worker, where vLLM is imported."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from maca_serve.common.errors import one_line
from maca_serve.doctor.attention import ask_attention
from maca_serve.doctor.building import Linear, Subject, as_rank_of
from maca_serve.doctor.experts import Experts, FusedExperts, gather, is_expert
from maca_serve.doctor.experts_trace import recording_experts
from maca_serve.doctor.forking import in_a_fork
from maca_serve.doctor.fusing import Layer, adopt_fusions, fuse, model_class
from maca_serve.doctor.hf_config import read_config
from maca_serve.doctor.loading import try_loading
from maca_serve.doctor.operators import missing_ops
from maca_serve.doctor.quant_config import capability_of, parse, refusal
from maca_serve.doctor.simulation import (
    PACKAGES,
    WITH_CUDA,
    Availability,
    assume_compiled,
    packages,
    recompute,
    simulate,
)
from maca_serve.doctor.trace import CANNOT_BE_ASKED, Recorder, kernels

Answer = dict[str, Any]
_NUMBER = re.compile(r"\b\d+\b")


def answer(question: dict[str, Any]) -> Answer:
    """See `maca_serve.doctor.worker`."""
    import vllm
    from vllm.model_executor.kernels import linear  # noqa: F401  (before the platform changes)

    # All that vLLM imports or computes once is done on the platform that it was built for.
    chooser, unasked, loading = None, None, None
    try:
        model = model_class(question["config"]["architectures"])
        chooser = _Chooser(question, model)
        if question.get("tensors"):
            # Of this machine's platform, whatever card is asked about: the tensors are the same.
            loading = try_loading(question["config"], question["tensors"], whole=question["whole"])
    except Exception as error:  # a class that does not import here may on the target
        unasked = one_line(error)

    def about(wanted: int | None) -> Answer:
        simulated, target = _become(wanted, question["tensor_parallel"])
        brought = WITH_CUDA if target["compiled_code_assumed"] else frozenset()
        found = {"refused": None} if chooser is None else chooser.answer(simulated, brought)
        about_all = {"vllm": vllm.__version__, "unasked": unasked, "loading": loading}
        return {**about_all, "target": target, **found}

    wanted = question["capabilities"]
    if len(wanted) == 1:
        return {"answers": [about(wanted[0])]}
    return {"answers": [in_a_fork(partial(about, capability)) for capability in wanted]}


def _become(wanted: int | None, tensor_parallel: int) -> tuple[bool, Answer]:
    """Be a card of that capability from now on; whether it is simulated, and what it is."""
    from vllm.platforms import current_platform

    compiled = bool(current_platform.is_cuda())
    simulated = wanted is not None and wanted != capability_of(current_platform)
    if simulated and wanted is not None:
        simulate(wanted, compiled)
        if compiled:
            recompute(wanted)
        else:
            assume_compiled(wanted)
    return simulated, {
        "name": _target_name(current_platform),
        "capability": capability_of(current_platform),
        "simulated": simulated,
        "compiled_code_assumed": simulated and not compiled,
        "tensor_parallel": tensor_parallel,
    }


class _Chooser:
    """Asks about all layers of one model."""

    def __init__(self, question: dict[str, Any], model: Any) -> None:
        from vllm.config import VllmConfig
        from vllm.model_executor.layers.quantization import get_quantization_config

        get_quantization_config("compressed-tensors")  # imports every method
        self.engine = VllmConfig()
        self.question = question
        self.model = model
        self.text = question["config"].get("text_config") or question["config"]
        self.hf_config, self.unread = _read_config(question["config"])
        self.quantized = set(question["quantized"])
        sizes = {name: (out, width) for name, (out, width) in question["sizes"].items()}
        linears = {name: size for name, size in sizes.items() if not is_expert(name)}
        self.experts, self.unasked = self._gather_experts(sizes.keys() - linears, sizes)
        adopt_fusions(model, linears)
        layers = fuse(model, linears)
        # Modules that are neither stored quantized nor built as linear layers are embeddings,
        # convolutions and routers of their own kind.
        self.layers = [x for x in layers if x.kind or self.quantized & set(x.parts)]
        # Layers of one shape and one place in their block differ by their number only.
        by_look = {(_NUMBER.sub("*", x.name), x.outs, x.width): x for x in self.layers}
        self.examples = list(by_look.values())

    def _gather_experts(
        self, names: set[str], sizes: dict[str, tuple[int, int]]
    ) -> tuple[list[list[Experts]], list[Answer]]:
        """Layers of experts, together those of one look; and those that cannot be asked about."""
        if not names:
            return [], []
        try:
            if self.unread:
                raise LookupError(f"vLLM cannot read the model's config: {self.unread}")
            found = gather(self.model, {name: sizes[name] for name in sorted(names)})
        except LookupError as error:
            return [], self._unasked(names, error)
        looks: dict[Any, list[Experts]] = {}
        for x in found:
            stored = sum(part in self.quantized for part in x.parts)
            look = _NUMBER.sub("*", x.name), x.count, *sorted(x.sizes.items()), stored
            looks.setdefault(look, []).append(x)
        return list(looks.values()), []

    def _unasked(self, modules: Iterable[str], error: Exception) -> list[Answer]:
        """Experts that nobody was asked about; those at 16 bits need no kernel for few bits."""
        names = sorted(self.quantized.intersection(modules))
        return [{"reason": one_line(error), "modules": names}] if names else []

    def answer(self, simulated: bool, brought: frozenset[str]) -> Answer:
        """Layers and variants on the platform as it is now."""
        from vllm.platforms import current_platform

        self.simulated = simulated
        self.availability = Availability(brought)
        capability = capability_of(current_platform)
        self.recorder = Recorder(self.availability, capability, forgiving=simulated)
        quantization = self.question["config"]["quantization_config"]
        dtype = self._dtype()
        refused = refusal(quantization, self.question["config"], dtype)
        if refused:
            return {"refused": refused, "dtype": str(dtype).removeprefix("torch.")}
        with packages(self.availability), self.recorder.recording():
            ranks = self.question["tensor_parallel"]
            layers = self._ask_linears(self.layers, quantization, ranks, dtype)
            of_experts, unasked = self._ask_experts(self.experts, quantization, ranks, dtype)
            variants = [self._variant(variant, dtype) for variant in self.question["variants"]]
        return {
            "refused": None,
            "dtype": str(dtype).removeprefix("torch."),
            "attention": self._attention(dtype),
            "layers": layers + of_experts,
            "unasked_experts": self.unasked + unasked,
            "variants": variants,
        }

    def _attention(self, dtype: torch.dtype) -> Answer | None:
        """None where nobody was asked: on another card's behalf, or about other attention."""
        plain = any(layer.kind == "QKVParallelLinear" for layer in self.layers)
        if self.simulated or self.unread or not plain:
            return None
        return ask_attention(self.hf_config, dtype)

    def _variant(self, variant: dict[str, Any], dtype: torch.dtype) -> Answer:
        quantization = variant["quantization_config"]
        dtype = getattr(torch, variant["dtype"]) if variant["dtype"] else dtype
        refused = refusal(quantization, self.question["config"], dtype)
        if refused:
            return {"change": variant["change"], "refused": refused, "layers": []}
        ranks = variant["tensor_parallel"]
        layers = self._ask_linears(self.examples, quantization, ranks, dtype)
        examples = [group[:1] for group in self.experts]
        of_experts, unasked = self._ask_experts(examples, quantization, ranks, dtype)
        if unasked:
            return {"change": variant["change"], "refused": unasked[0]["reason"], "layers": []}
        return {"change": variant["change"], "refused": None, "layers": layers + of_experts}

    def _ask_linears(
        self, layers: list[Layer], quantization: Any, ranks: int, dtype: torch.dtype
    ) -> list[Answer]:
        with as_rank_of(self.engine, ranks, dtype, self.hf_config):
            return [self._ask(Linear(layer, self.text, ranks), quantization) for layer in layers]

    def _ask_experts(
        self, groups: list[list[Experts]], quantization: Any, ranks: int, dtype: torch.dtype
    ) -> tuple[list[Answer], list[Answer]]:
        """An answer for every layer, asked for one of each look; and what cannot be asked about."""
        entries: list[Answer] = []
        unasked: list[Answer] = []
        if not groups:
            return entries, unasked
        with (
            as_rank_of(self.engine, ranks, dtype, self.hf_config),
            recording_experts(self.recorder, self.availability),
        ):
            for group in groups:
                try:
                    fused = FusedExperts(group[0], self.model, self.engine, ranks)
                except Exception as error:  # of a block's code that is not known here
                    unasked += self._unasked((part for x in group for part in x.parts), error)
                    continue
                entry = self._ask(fused, quantization)
                entries += [entry | {"layer": x.name, "parts": list(x.parts)} for x in group]
        return entries, unasked

    def _ask(self, subject: Subject, quantization: Any) -> Answer:
        plain, built = self._build(subject.build, quantization, pretend=False)
        pretended, _ = self._build(subject.build, quantization, pretend=True)
        if plain["kernel"] is None and pretended["kernel"] is None:
            # The packages would not help: what is wrong besides is the better reason.
            plain["error"] = pretended["error"]
        plain["refusals"] = _better_reasons(plain["refusals"], pretended["refusals"])
        entry = {**subject.describe(built), **plain}
        if pretended["kernel"] != plain["kernel"] and pretended["kernel"] is not None:
            entry["with_packages"] = {
                "kernel": pretended["kernel"],
                "needs": pretended["needs"],
                "install": [PACKAGES[name] for name in pretended["needs"]],
            }
        if plain["quantized"] and plain["refusals"]:
            roomy, _ = self._build(subject.build_roomy, quantization, pretend=False)
            entry["roomy_kernel"] = roomy["kernel"]
        return entry

    def _build(
        self, build: Callable[[Any], Any], quantization: Any, *, pretend: bool
    ) -> tuple[Answer, Any]:
        """What vLLM answered while it built a layer, and the layer; None where it would not."""
        self.availability.pretend = pretend
        trace = self.recorder.start()
        built, error = None, None
        try:
            built = build(parse(quantization, self.question["config"], self.model))
        except Exception as problem:  # whatever vLLM raises is why it would not load
            error = one_line(problem)
        method = getattr(built, "quant_method", None)
        scheme = getattr(built, "scheme", None) or method
        quantized = built is None or not type(method).__name__.startswith("Unquantized")
        kernel = _kernel_of(built) or trace.chosen
        if error is not None or not quantized:
            kernel = None
        found = {
            "quantized": quantized,
            "scheme": type(scheme).__name__ if built is not None and quantized else None,
            "kernel": kernel.__name__ if kernel else None,
            "needs": trace.chosen_needs,
            "refusals": [
                {"kernel": name, "reason": reason, "needs": needs}
                for name, reason, needs in trace.refused
            ],
            "error": error,
            "missing_ops": [] if self.simulated or kernel is None else missing_ops(kernel, scheme),
        }
        return found, built

    def _dtype(self) -> torch.dtype:
        """What vLLM would compute in: the model's dtype, or the platform's where that is none."""
        from vllm.platforms import current_platform

        name = self.text.get("dtype") or self.question["config"].get("dtype")
        name = name or self.question["config"].get("torch_dtype") or "float32"
        dtype = getattr(torch, str(name).removeprefix("torch."))
        supported = current_platform.supported_dtypes
        return dtype if dtype in supported and dtype != torch.float32 else supported[0]


def _better_reasons(plain: list[Answer], pretended: list[Answer]) -> list[Answer]:
    """A missing package is no reason where the kernel refuses with the package, too."""
    with_package = {
        refusal["kernel"]: refusal
        for refusal in pretended
        if not refusal["reason"].startswith(CANNOT_BE_ASKED)
    }
    return [
        with_package.get(refusal["kernel"], refusal) | {"needs": []}
        if refusal["needs"] and refusal["kernel"] in with_package
        else refusal
        for refusal in plain
    ]


def _read_config(config: dict[str, Any]) -> tuple[Any, str | None]:
    """vLLM's config object, or why there is none."""
    try:
        return read_config(config), None
    except Exception as error:  # whatever vLLM raises is the reason
        return None, one_line(error)


def _kernel_of(layer: Any) -> type | None:
    """The kernel or experts class that a built layer holds, wherever its scheme keeps it."""
    known = set(kernels())
    method = getattr(layer, "quant_method", None)
    experts: type | None = getattr(method, "experts_cls", None)
    if experts is not None:
        return experts
    for holder in (getattr(layer, "scheme", None), method):
        for value in vars(holder).values() if holder is not None else ():
            if type(value) in known:
                return type(value)
    return None


def _target_name(platform: Any) -> str:
    return str(platform.get_device_name() or platform.device_name)
