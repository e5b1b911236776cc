"""The verb `train`."""

from headstart.fit.cli import train

__all__ = ["train"]
