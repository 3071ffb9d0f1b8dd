"""One list of parameters for several functions that take the same."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def same_parameters_as(other: Callable[..., Any]) -> Callable[[Function], Function]:
    """Show a function to ``help()``, editors and typer with the parameters of ``other``."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function, eval_str=True).return_annotation
        parameters = inspect.signature(other, eval_str=True)
        function.__signature__ = parameters.replace(return_annotation=own)  # type: ignore[attr-defined]
        function.__annotations__ = {**inspect.get_annotations(other), "return": own}
        return function

    return decorate
