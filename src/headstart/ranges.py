"""Ranges of options, checked when the command line and the config files are read."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from headstart.errors import UserError

if TYPE_CHECKING:  # plain types to a type checker
    Count = int
    Seed = int
    Positive = int
    ImageSize = int
    Port = int
    Rate = float
    NonNegative = float
    Fraction = float
    OpenFraction = float
    Share = float
    RunName = str
else:
    from jsonargparse import typing

    Count = typing.NonNegativeInt
    Seed = typing.restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])  # the seeds numpy accepts
    Positive = typing.restricted_number_type("Positive", int, [(">", 0), ("<", 2**31)])
    OpenFraction = typing.OpenUnitInterval
    Share = typing.ClosedUnitInterval
    ImageSize = typing.restricted_number_type("ImageSize", int, [(">=", 32), ("<=", 2048)])
    Port = typing.restricted_number_type("Port", int, [(">=", 0), ("<", 2**16)])
    # The upper bound excludes infinity.
    Rate = typing.restricted_number_type("Rate", float, [(">", 0), ("<=", 1000)])
    NonNegative = typing.restricted_number_type("NonNegative", float, [(">=", 0), ("<=", 1000)])
    Fraction = typing.restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
    RunName = typing.restricted_string_type("RunName", r"(?!\.{0,2}$)[^/\\\0]*$")  # a single folder name


def arguments_of(of: type) -> set[str]:
    """The argument names of ``__init__``, including those of the bases, which may be passed as ``**kwargs``."""
    return {name for base in of.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}


def check_arguments(of: type, values: Mapping[str, Any]) -> None:
    """Refuses what the command line refuses: a number out of range, a word that is not among the choices.

    Raises:
        UserError: an argument is invalid; the message names it and its valid values.
    """
    for name, hint in get_type_hints(vars(of)["__init__"]).items():
        value = values.get(name)
        for kind in [hint, *get_args(hint)]:
            choices = get_args(kind) if get_origin(kind) is Literal else None
            restriction = getattr(kind, "_restrictions", None)
            if value is None or isinstance(value, Mapping) or not (choices or restriction):
                continue
            if choices and value not in choices:
                raise UserError(f"{of.__name__}: {name}={value!r} is not one of {', '.join(map(str, choices))}")
            try:
                kind(value) if restriction else None
            except (TypeError, ValueError) as error:
                raise UserError(f"{of.__name__}: {name}={value!r}: {error}") from error


def plain(value: Any) -> Any:
    """Converts numbers of the types above, and of numpy, to Python's own, for checkpoints and YAML files."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, int) else float(value)
