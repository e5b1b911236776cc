"""The ranges that options may take: checked when the command line and the config files are read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # to a type checker they are the plain numbers
    Count = int
    Positive = int
    ImageSize = int
    Rate = float
    NonNegative = float
    Fraction = float
    OpenFraction = float
    Share = float
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
