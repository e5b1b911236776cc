"""A run's folder: created once, never overwritten, with everything needed to repeat and judge the run."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import PIL
import torch
import torchvision
import yaml
from filelock import FileLock, Timeout
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

import headstart
from headstart.data import splits
from headstart.errors import UserError
from headstart.files import RUNS_MARK, csv_bytes, flat, write_atomically
from headstart.model.backbone import FrozenBackbone
from headstart.runs.history import CONFIG, RESULT, SPLITS_FILE, Run
from headstart.runs.logger import RunLogger
from headstart.runs.trackers import Tracker
from headstart.terminal import say


def new_run_folder(logs: Path, name: str, images: Path) -> Path:
    """Creates ``logs/name/<start time>``; ``mkdir`` fails if the folder exists, so no two runs share one.

    ``images`` is the location of the data: in a folder of class folders, the run would be a class.
    """
    if logs.resolve() == images:
        raise UserError(f"--logs={logs}: is the folder of the images; choose another")
    start = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = os.fsencode(name).decode(errors="replace")  # the data's name may not be Unicode, as TensorBoard needs
    attempt = 1
    while True:
        folder = logs / name / (start if attempt == 1 else f"{start}_{attempt}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            (logs / RUNS_MARK).touch()
            return folder.resolve()
        except FileExistsError:
            attempt += 1
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be created ({error.strerror}); choose another --logs or --name"
            ) from error


class RunFolder(Callback):
    """Creates the run's folder when a fit starts, or reopens that of a resumed run, and writes its files.

    ``config`` is the configuration as YAML, which repeats the run; ``kept`` are further files, by path in the folder.
    """

    def __init__(
        self,
        logs: Path,
        name: str,
        config: str,
        resumed: Run | None = None,
        kept: Mapping[str, bytes] | None = None,
    ) -> None:
        self.logs, self.name, self.config = logs, name, config
        self.resumed, self.kept = resumed, kept or {}
        self.folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs after the data's setup and before that of the checkpoint callbacks, which Lightning puts last."""
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning at run time
        if stage != "fit" or dry or self.folder:
            return
        check_limits(trainer)
        chosen: Path | None = None
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            resumed = self.resumed and self.resumed.folder.resolve()
            chosen = resumed or new_run_folder(self.logs, self.name, data.store.source.path)
            self._lock(chosen)
            make_loggers(trainer, chosen)  # before those of other ranks, which share a database
        self.folder = trainer.strategy.broadcast(chosen)
        assert self.folder
        make_loggers(trainer, self.folder)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")
        if trainer.is_global_zero and not self.resumed:
            self._write_inputs(data)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if not isinstance(logger, RunLogger):  # others begin a run of their own when a run is resumed
                logger.log_hyperparams(settings_in(self.config))
            elif not self.resumed:
                logger.compare_by(settings_in(self.config))
                logger.experiment.add_text("run", self._card(trainer.datamodule))  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_there()
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, RunLogger) and logger.folder:
                logger.experiment.flush()  # else a killed run loses its last two minutes of events

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says how to resume an interrupted run, and releases its folder."""
        if self.folder and trainer.is_global_zero:
            self.lock.release()
            run = Run(self.folder)
            if isinstance(exception, KeyboardInterrupt | SIGTERMException) and run.last.is_file():
                say(f"resume:   {run.resume_command()}")

    def finish(self, trainer: Trainer, scores: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        """Writes ``result.json``; returns the result."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._check_there()
        backbone = cast(FrozenBackbone, trainer.lightning_module.backbone)
        result = result_of(backbone, data, scores, seconds) | {"images_per_epoch": images_per_epoch(trainer)}
        if self.folder and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            write_result(self.folder, result)
            self.lock.release()
        return result

    def _lock(self, folder: Path) -> None:
        """Keeps other processes from resuming the run; the lock ends with this process."""
        self.lock = FileLock(folder / ".lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise UserError(f"{folder}: another process is training this run; wait for it, or stop it") from error

    def _check_there(self) -> None:
        """A checkpoint would recreate a deleted folder, without the run's other files."""
        if self.folder and not (self.folder / CONFIG).is_file():
            raise UserError(f"{self.folder}: was deleted during the run; start again")

    def _write_inputs(self, data: Any) -> None:
        assert self.folder
        for path, content in self.kept.items():
            write_atomically(self.folder / path, content)
        # What `auto` became, so that a run that is resumed or repeated does not choose again.
        precision = f"feature_precision: {getattr(data.store, 'arithmetic', 'auto')}"
        self.config = self.config.replace("feature_precision: auto", precision)
        write_atomically(self.folder / CONFIG, self.config.encode())
        write_atomically(self.folder / SPLITS_FILE, splits.to_csv(data.items, data.class_names))
        write_atomically(self.folder / "skipped.csv", csv_bytes([["path", "reason"], *data.store.skipped.items()]))

    def _card(self, data: Any) -> str:
        counts = "\n".join(f"| {split} | {len(data.items_in(split))} |" for split in splits.SPLITS)
        return (
            f"`{command_line()}`\n\n| split | images |\n|---|---|\n{counts}\n\n"
            f"{len(data.class_names)} classes, {len(data.store.skipped)} images left out\n\n"
            f"```yaml\n{self.config}```"
        )


def make_loggers(trainer: Trainer, folder: Path) -> None:
    """Makes the loggers that wait for the run's folder, once it is known."""
    for place, logger in enumerate(trainer.loggers):
        if isinstance(logger, Tracker):
            trainer.loggers[place] = logger.made(folder)
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.folder = folder


def check_limits(trainer: Trainer) -> None:
    """Rejects a share of less than one batch; for the test, Lightning would do so only after the training."""
    for split in splits.SPLITS:
        share = getattr(trainer, f"limit_{split}_batches")
        if isinstance(share, float) and 0 < share < 1:
            batches = len(getattr(trainer.datamodule, f"{split}_dataloader")())  # type: ignore[attr-defined]
            if batches and int(batches * share) == 0:
                raise UserError(f"--trainer.limit_{split}_batches={share}: is less than one of {batches} batches")


def images_per_epoch(trainer: Trainer) -> int:
    """Training images per epoch; fewer than the split has if an option ends epochs early."""
    data, progress = trainer.datamodule, trainer.fit_loop.epoch_loop.batch_progress  # type: ignore[attr-defined]
    images, batches = len(data.items_in("train")), int(min(trainer.num_training_batches, progress.total.ready))
    return min(images - images % trainer.world_size, batches * int(data.batch_size))


def settings_in(config: str) -> dict[str, Any]:
    """The settings by which runs are compared, by dotted name."""
    values = flat(yaml.safe_load(config))
    return {
        name: value for name, value in values.items() if not name.startswith("trainer.") or name.endswith("max_epochs")
    }


def result_of(backbone: FrozenBackbone, data: Any, scores: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The content of ``result.json``: scores by name, such as test/acc, and what they depend on."""
    about: dict[str, Any] = {
        "seconds": {name: round(value, 3) for name, value in (data.store.seconds | seconds).items()},
        "images": {split: len(data.items_in(split)) for split in splits.SPLITS},
        "classes": len(data.class_names),
        "skipped": len(data.store.skipped),
        "backbone": backbone.name,
        "weights": backbone.weights,
        "licence": backbone.licence,
        "digest": backbone.digest(),
        "arithmetic": getattr(data.store, "arithmetic", None),
        "command": command_line(),
        "versions": versions() | dict(backbone.versions),
    }
    return scores | about


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes ``result.json``, which marks the run as finished."""
    write_atomically(folder / RESULT, json.dumps(result, indent=2).encode())


def command_line() -> str:
    """The command line that started this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of the software that the numbers may depend on."""
    return {
        "headstart": headstart.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pytorch-lightning": version("pytorch-lightning"),
        "pillow": PIL.__version__,
    }
