"""A heap: unlabelled images, with their features from the cache."""

from collections import Counter
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from headstart.data import folders
from headstart.data.module import ImageFolderData
from headstart.data.sources import ListedSource
from headstart.data.splits import Item
from headstart.data.store import STORE_OPTIONS, FeatureStore, loaded_store
from headstart.device import device_of
from headstart.errors import UserError
from headstart.features.arithmetic import as_trained
from headstart.model.backbone import BACKBONE_OPTIONS
from headstart.model.classifier import TransferClassifier
from headstart.parser import OptionParser, add_accelerator, add_checkpoint, add_options
from headstart.terminal import say_all


def folder_of_images(root: str, option: str = "--data.root") -> ListedSource:
    """All images below a folder, whatever the folders within it."""
    folder, others = folders.existing(root, option), Counter[str]()
    paths = folders.images(folder, others)
    folders.say_left_out(others)
    if not paths:
        raise UserError(f"{option}={root}: contains no images; give a folder with images")
    return ListedSource(folder, [], [Item(path.relative_to(folder).as_posix(), 0) for path in paths])


def files_and_folders(paths: Sequence[str]) -> ListedSource:
    """Images given as files and folders; their paths are as given."""
    found = list[str]()
    for path in paths:
        items = folder_of_images(path, "PATH").listed() if Path(path).is_dir() else [Item("", 0)]
        found += [str(Path(path) / item.path) for item in items]
    return ListedSource(Path.cwd(), [], [Item(path, 0) for path in dict.fromkeys(found)], Path(paths[0]))


def add_features(parser: OptionParser) -> None:
    """Adds the options of the backbone and of the cache."""
    add_checkpoint(parser)
    add_options(parser, TransferClassifier, "model", BACKBONE_OPTIONS)
    add_options(parser, ImageFolderData, "data", STORE_OPTIONS)
    add_accelerator(parser)


def load(source: ListedSource, given: Any) -> tuple[FeatureStore, TransferClassifier | None]:
    """The readable images with their features, by the backbone of the checkpoint, if any, or of the options."""
    module, options = None, signature(TransferClassifier).parameters
    if given.ckpt_path:
        if any(given.model[name] != options[name].default for name in BACKBONE_OPTIONS):
            raise UserError("--ckpt_path brings its own backbone; leave out --model")
        module = TransferClassifier.load_from_checkpoint(Path(given.ckpt_path).expanduser()).eval()
        given.data.feature_precision = as_trained(
            given.data.feature_precision, module.arithmetic, device_of(given.accelerator)
        )
    store = loaded_store(source, given, module.backbone if module else None)
    say_all([f"data: {path} is left out: {reason}" for path, reason in store.skipped.items()])
    if not store.items:
        raise UserError(f"{source.path}: no readable image; {len(store.skipped)} files cannot be read")
    return store, module
