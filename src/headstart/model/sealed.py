"""How checkpoints reach the disk: whole or not at all, sealed by a hash, and never executed."""

import hashlib
import io
from collections.abc import Mapping
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
BEST = "checkpoints/best.ckpt"  # in a run's folder


class SealedCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder, flushes it to the disk, and renames it.

    Lightning writes to $TMPDIR and moves: on another file system that is a copy, and a kill during it leaves a torn
    file where the last good checkpoint was. It also hides that a folder cannot be written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Seals and writes a checkpoint; where it cannot be written, what was there before still is."""
        file = io.BytesIO()
        torch.save({**checkpoint, SEAL: content_digest(checkpoint)}, file)
        data = file.getvalue()
        try:
            write_atomically(Path(path), data)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}; {len(data):,} bytes are needed)"
                f"{'; the checkpoint before it is intact' if Path(path).exists() else ''}"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a local checkpoint; no code in it is executed, whatever ``weights_only`` says."""
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        check_seal(checkpoint, Path(path))
        return checkpoint


def read_sealed(path: Path, logs: Path = Path("logs")) -> dict[str, Any]:
    """The content of any checkpoint of ours, a local file; no code in it is executed.

    A missing, damaged or foreign file is a ``UserError``, which names other checkpoints: beside it, or in ``logs``.
    """
    path = in_either_form(path)
    if not path.is_file():
        candidates = sorted((path if path.is_dir() else logs).rglob("*.ckpt"), key=lambda found: found.stat().st_mtime)
        near = f"; there are {', '.join(map(str, candidates[:-4:-1]))}" if candidates else ""
        raise UserError(f"--ckpt_path={path}: is no file{near}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        dict(checkpoint["state_dict"])
    except Exception as error:  # whatever the file holds: zip and pickle raise a dozen kinds
        others = sorted(other.name for other in path.parent.glob("*.ckpt") if other.name != path.name)
        there = f"; beside it lies {', '.join(others[:3])}" if others else ""
        raise UserError(f"--ckpt_path={path}: is corrupt or no checkpoint{there}") from error
    check_seal(checkpoint, path)
    return checkpoint


def check_seal(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Compares a checkpoint's content with its seal; one that a plain Trainer wrote has none."""
    content = {name: value for name, value in checkpoint.items() if name != SEAL}
    if SEAL in checkpoint and checkpoint[SEAL] != content_digest(content):
        raise UserError(f"{path}: is corrupt (its sha256 differs); try another of {path.parent}")


def content_digest(value: Any) -> str:
    """sha256 over plain values and tensors, in whatever they are nested."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"dict {len(value)} ".encode())
        for name, entry in value.items():
            _add(digest, name)
            _add(digest, entry)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)} ".encode())
        for entry in value:
            _add(digest, entry)
    else:
        digest.update(f"{type(value).__name__} {value!r} ".encode())


class RunCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` whose best score survives in another folder, where Lightning drops it.

    ``moved``: the checkpoint that is loaded belongs to this very run, wherever its folder was then. Else a new run was
    begun from it: it lies there as the best one so far, and later ones must beat its score.
    """

    def __init__(self, moved: bool, **options: Any) -> None:
        super().__init__(enable_version_counter=False, **options)
        self.moved = moved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state whose paths are of the old place."""
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
    """The two checkpoints of a run: the best epoch, by the options ``best``, and the last one to resume from.

    Lightning's own `last` is written only in epochs that were among the best.
    """
    return RunCheckpoint(moved, filename="best", **best), RunCheckpoint(
        moved, filename="last", save_on_train_epoch_end=True
    )
