"""Checkpoint files: written atomically, sealed by a hash, and loaded without executing code."""

import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from headstart.errors import UserError
from headstart.files import in_either_form, write_atomically
from headstart.model.backbone import tensor_bytes

SEAL = "headstart_sha256"
BEST = "checkpoints/best.ckpt"  # relative to the run's folder


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder, flushes it to disk, and renames it.

    Lightning writes to $TMPDIR and moves the file: on another file system this is a copy, and a kill during it destroys
    the previous checkpoint. It also hides that a folder is not writable.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Seals and writes a checkpoint; on failure the previous one is intact."""
        file = io.BytesIO()
        torch.save({**checkpoint, SEAL: content_digest(checkpoint)}, file)
        data = file.getvalue()
        try:
            write_atomically(Path(path), data)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}; {len(data):,} bytes are needed)"
                f"{'; the previous checkpoint is intact' if Path(path).exists() else ''}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a local checkpoint without executing code, whatever ``weights_only`` is."""
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        check_seal(checkpoint, Path(path))
        return checkpoint


def read_sealed(path: Path, logs: Path = Path("logs")) -> dict[str, Any]:
    """Reads a local checkpoint of headstart without executing code.

    A missing, damaged or foreign file is a ``UserError`` that names other checkpoints in its folder or in ``logs``.
    """
    path = in_either_form(path)
    if not path.is_file():
        candidates = sorted((path if path.is_dir() else logs).rglob("*.ckpt"), key=lambda found: found.stat().st_mtime)
        near = f"; try {', '.join(map(str, candidates[:-4:-1]))}" if candidates else ""
        raise UserError(f"--ckpt_path={path}: is not a file{near}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        dict(checkpoint["state_dict"])
    except PermissionError as error:
        raise UserError(f"--ckpt_path={path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # zip and pickle raise many kinds
        others = sorted(other.name for other in path.parent.glob("*.ckpt") if other.name != path.name)
        there = f"; try {', '.join(others[:3])} in its folder" if others else ""
        raise UserError(f"--ckpt_path={path}: is corrupt or not a checkpoint{there}") from error
    check_seal(checkpoint, path)
    return checkpoint


def check_seal(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Compares a checkpoint's content with its seal, if it has one; those of a plain Trainer have none."""
    content = {name: value for name, value in checkpoint.items() if name != SEAL}
    try:
        found = content_digest(content, most=path.stat().st_size)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is corrupt (it holds a value again and again)") from error
    if checkpoint.get(SEAL, found) != found:
        raise UserError(f"{path}: is corrupt (its sha256 differs); try another one in {path.parent}")


def content_digest(value: Any, most: float = math.inf) -> str:
    """The sha256 of nested plain values and tensors.

    Raises:
        ValueError: there are more than ``most`` parts: a pickle of so many bytes, which can hold a list many times.
    """
    digest = hashlib.sha256()
    for number, part in enumerate(_parts(value)):
        if number > most:
            raise ValueError
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """The bytes of a value, part by part."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)} ".encode()
        yield tensor_bytes(value)
    elif isinstance(value, Mapping):
        yield f"dict {len(value)} ".encode()
        for pair in value.items():
            yield from _parts(pair[0])
            yield from _parts(pair[1])
    elif isinstance(value, list | tuple):
        yield f"list {len(value)} ".encode()
        for entry in value:
            yield from _parts(entry)
    else:
        yield f"{type(value).__name__} {value!r} ".encode()


class RunCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that keeps its best score in another folder, where Lightning would drop it.

    ``moved``: the loaded checkpoint belongs to the same run, whose folder may have moved. Else it starts a new run: it
    is the best one so far there, and later ones must beat its score.
    """

    def __init__(self, moved: bool, **options: Any) -> None:
        super().__init__(enable_version_counter=False, **options)
        self.moved = moved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, with its paths moved to the current folder."""
        if self.moved and self.dirpath:
            state_dict = {name: self._moved(value) for name, value in state_dict.items()} | {"dirpath": self.dirpath}
        super().load_state_dict(state_dict)
        if not self.moved and self.dirpath and (file := Path(self.dirpath).parent / BEST).is_file() and self.monitor:
            self.best_model_path = self.kth_best_model_path = str(file)
            self.best_model_score = state_dict["current_score"]
            self.best_k_models = {str(file): state_dict["current_score"]}
            self.kth_value = state_dict["current_score"]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, str) and value.endswith(".ckpt"):
            assert self.dirpath
            return str(Path(self.dirpath) / Path(value).name)
        if isinstance(value, dict):
            return {self._moved(name): self._moved(entry) for name, entry in value.items()}
        return value


def run_checkpoints(moved: bool, **best: Any) -> tuple[RunCheckpoint, RunCheckpoint]:
    """The two checkpoints of a run: the best epoch, by the options ``best``, and the last one, to resume from.

    Lightning's ``save_last`` writes only in epochs that are among the best.
    """
    return RunCheckpoint(moved, filename="best", **best), RunCheckpoint(
        moved, filename="last", save_on_train_epoch_end=True
    )
