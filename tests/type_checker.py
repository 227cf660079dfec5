"""Which annotations the tests check, at every call: all of functions and dataclasses that are no part of a function.

beartype checks them, for which an int is a float, as PEP 484 has it. jaxtyping adds a memory of the sizes of
dimensions, which takes many times as long as that check: it is left to functions with arrays in their annotations.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
_jaxtyped = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The decorator that jaxtyping's import hook gives to every function and class of the packages it is told."""

    def decorate(defined: Any) -> Any:
        # A function in a function is defined, and would be decorated, at each call of the outer one.
        if "<locals>" in defined.__qualname__:
            return defined
        if inspect.isfunction(defined) and not _has_arrays(defined):
            return typechecker(defined)
        return _jaxtyped(defined, typechecker=typechecker)

    return decorate


def _has_arrays(function: Callable[..., Any]) -> bool:
    """Whether an annotation is or contains a type of jaxtyping, or is a string, which may name one."""
    annotations = function.__annotations__.values()
    return any(isinstance(annotation, str) or "jaxtyping" in repr(annotation) for annotation in annotations)


# The hook looks the decorator up in the module, when a module that it has decorated is imported.
jaxtyping.jaxtyped = jaxtyped
