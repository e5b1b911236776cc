"""headstart: transfer learning on frozen features, with PyTorch Lightning."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headstart.backbone import FrozenBackbone
    from headstart.classifier import TransferClassifier
    from headstart.data import DatasetData, ImageFolderData

__version__ = version("headstart")
__all__ = ["DatasetData", "FrozenBackbone", "ImageFolderData", "TransferClassifier", "__version__"]

_HOMES = {
    "DatasetData": "data",
    "ImageFolderData": "data",
    "FrozenBackbone": "backbone",
    "TransferClassifier": "classifier",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used, so that `headstart --help` need not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"headstart.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'headstart' has no attribute {name!r}")
