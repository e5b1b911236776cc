"""headstart: transfer learning on frozen features, with PyTorch Lightning."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headstart.data.datasets import DatasetData
    from headstart.data.module import ImageFolderData
    from headstart.model.backbone import FrozenBackbone
    from headstart.model.classifier import TransferClassifier

__version__ = version("headstart")
__all__ = ["DatasetData", "FrozenBackbone", "ImageFolderData", "TransferClassifier", "__version__"]

_HOMES = {
    "DatasetData": "data.datasets",
    "ImageFolderData": "data.module",
    "FrozenBackbone": "model.backbone",
    "TransferClassifier": "model.classifier",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used, so that `headstart --help` need not wait for torch."""
    if name in _HOMES:
        found = getattr(import_module(f"headstart.{_HOMES[name]}"), name)
        import_module("headstart.terminal").quiet_libraries()  # as on the command line
        return found
    raise AttributeError(f"module 'headstart' has no attribute {name!r}")
