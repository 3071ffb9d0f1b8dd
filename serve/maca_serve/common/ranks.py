"""How many processes share a model: vLLM's tensor and pipeline parallel sizes."""

from dataclasses import dataclass

from maca_serve.common.errors import UserError
from maca_serve.doctor import diagnose
from maca_serve.doctor.checks import heads_misfit
from maca_serve.formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Ranks:
    """Sizes of the two groups.

    Attributes:
        tensor: ranks that share every layer (`--tp`).
        pipeline: ranks that share the stack of layers (`--pp`).
    """

    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        """Raise UserError for sizes that are not positive."""
        for option, size in (("--tp", self.tensor), ("--pp", self.pipeline)):
            if size < 1:
                raise UserError(f"{option}: {size} is not positive")

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.tensor * self.pipeline

    @property
    def arguments(self) -> list[str]:
        """For vLLM's command line; its defaults are left unsaid."""
        sizes = {"--tensor-parallel-size": self.tensor, "--pipeline-parallel-size": self.pipeline}
        return [part for name, size in sizes.items() if size > 1 for part in (name, str(size))]


def check_ranks(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Refuse sizes that do not divide the model, before vLLM takes minutes to do so.

    For a quantized checkpoint the doctor is asked, which takes as long as importing vLLM.

    Raises:
        UserError: heads, groups or packed words that ranks would tear apart, or too few layers.
    """
    layers = checkpoint.text_config.get("num_hidden_layers")
    if layers and layers < ranks.pipeline:
        raise UserError(f"--pp: {ranks.pipeline} ranks for the {layers} layers of the model")
    if ranks.tensor == 1:
        return
    if misfit := heads_misfit(checkpoint.config, ranks.tensor):
        raise UserError(f"--tp: {misfit[0]}: {misfit[1]}")
    if checkpoint.quantized:
        _ask_doctor(checkpoint, ranks.tensor)


def _ask_doctor(checkpoint: Checkpoint, tensor: int) -> None:
    problems = diagnose(checkpoint.path, tensor_parallel=tensor)["problems"]
    errors = [problem for problem in problems if problem["severity"] == "error"]
    if errors:
        raise UserError(
            f"--tp: {errors[0]['what']}; {errors[0]['cure']}"
            f" (maca-serve doctor {checkpoint.path} --tp {tensor} says more)"
        )
