"""The ranges that options may take: checked when the command line and the config files are read."""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # to a type checker they are the plain numbers
    Count = int
    Positive = int
    ImageSize = int
    Rate = float
    NonNegative = float
    Fraction = float
    OpenFraction = float
    Share = float
    RunName = str
else:
    from jsonargparse import typing

    Count = typing.NonNegativeInt
    Positive = typing.PositiveInt
    OpenFraction = typing.OpenUnitInterval
    Share = typing.ClosedUnitInterval
    ImageSize = typing.restricted_number_type("ImageSize", int, [(">=", 32), ("<=", 2048)])
    # An upper bound, since infinity is above zero too.
    Rate = typing.restricted_number_type("Rate", float, [(">", 0), ("<=", 1000)])
    NonNegative = typing.restricted_number_type("NonNegative", float, [(">=", 0), ("<=", 1000)])
    Fraction = typing.restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
    RunName = typing.restricted_string_type("RunName", r"(?!\.{0,2}$)[^/\\\0]*$")  # one folder below the logs


def arguments_of(of: type) -> set[str]:
    """The names that a class's ``__init__`` takes, along its bases too, whose arguments may come as ``**kwargs``."""
    return {name for base in of.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}


def plain(value: Any) -> Any:
    """Numbers of the ranges above, and of numpy, as Python's own: a checkpoint and a YAML file hold nothing else."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, int) else float(value)
