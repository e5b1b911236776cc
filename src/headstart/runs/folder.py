"""A run's own folder: claimed once, never overwritten, with all that is needed to repeat and to judge the run."""

import csv
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import PIL
import torch
import torchvision
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

import headstart
from headstart.data import splits
from headstart.errors import UserError
from headstart.files import csv_bytes, write_atomically
from headstart.model.backbone import FrozenBackbone

RESULT = "result.json"


def claim(logs: Path, name: str) -> Path:
    """Makes ``logs/name/<start time>``; ``mkdir`` fails where the folder exists, so no two runs get the same.

    Raises:
        UserError: the folder cannot be made.
    """
    start = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    attempt = 1
    while True:
        folder = logs / name / (start if attempt == 1 else f"{start}_{attempt}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder.resolve()
        except FileExistsError:
            attempt += 1
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}); choose --trainer.default_root_dir"
            ) from error


def newest_unfinished(logs: Path, name: str) -> Path:
    """The newest run of the name that has a ``last.ckpt`` and no ``result.json``.

    Args:
        logs: where runs are.
        name: of the run; may hold wildcards.

    Raises:
        UserError: there is none.
    """
    started = logs.glob(f"{name}/*/checkpoints/last.ckpt")
    for path in sorted(started, key=lambda path: path.parts[-3], reverse=True):
        if not (path.parent.parent / RESULT).exists():
            return path.resolve()
    raise UserError(
        f"--ckpt_path=last: no unfinished run below {logs / name}; give a checkpoint's path, or leave it out"
    )


class RunLogger(TensorBoardLogger):
    """TensorBoard, in the run's folder; it has no experiment before the folder is claimed.

    Lightning asks ``hasattr(logger, "experiment")`` before the data is read, and a run that its data stops should leave
    no folder behind.

    Args:
        steps_done: of a run that goes on: TensorBoard forgets what a killed process wrote of later steps.
    """

    def __init__(self, steps_done: int | None = None) -> None:
        purge: dict[str, Any] = {} if steps_done is None else {"purge_step": steps_done}
        super().__init__(save_dir="", name="", version="", default_hp_metric=False, **purge)
        self.folder: Path | None = None

    @property
    def log_dir(self) -> str:
        return str(self.folder) if self.folder else ""

    @property
    def save_dir(self) -> str:
        return self.log_dir

    @property
    def experiment(self) -> Any:
        if self.folder is None:
            raise AttributeError("no run folder yet")
        return super().experiment


class RunFolder(Callback):
    """Claims the run's folder when a fit starts, and keeps its files.

    Args:
        logs: where runs land.
        name: of the run; the folder is ``logs/name/<start time>``.
        config: the run's configuration as YAML; repeats it.
        settings: the configuration's values by dotted name, for the hparams.
        command: that started the run.
        resumed: the folder of the run that goes on, instead of a new one.
        kept: more files of the folder, by their path in it.
    """

    def __init__(
        self,
        logs: Path,
        name: str,
        config: str,
        settings: dict[str, Any],
        command: str,
        resumed: Path | None = None,
        kept: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.logs, self.name, self.config, self.settings, self.command = logs, name, config, settings, command
        self.resumed, self.kept = resumed, kept
        self.folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the data's own setup; before that of the checkpoint callbacks, which Lightning puts last."""
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning at run time
        if stage != "fit" or dry or self.folder:
            return
        chosen = (self.resumed or claim(self.logs, self.name)) if trainer.is_global_zero else None
        self.folder = trainer.strategy.broadcast(chosen)
        assert self.folder
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.folder = self.folder
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")
        if trainer.is_global_zero and not self.resumed:
            self._write_inputs(trainer.datamodule)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(logger := trainer.logger, RunLogger) and trainer.is_global_zero and not self.resumed:
            # The HParams tab stays empty unless the metric is named at the start.
            logger.log_hyperparams(self.settings, {"hp/val_acc": 0.0})
            logger.experiment.add_text("run", self._card(trainer.datamodule))  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(logger := trainer.logger, RunLogger) and trainer.is_global_zero and logger.folder:
            logger.experiment.flush()  # else a killed run shows nothing of its last two minutes

    def finish(self, trainer: Trainer, scores: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        """Writes ``result.json`` and the score by which the HParams tab compares runs."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        backbone = cast(FrozenBackbone, trainer.lightning_module.backbone)
        result = result_of(backbone, data, scores, seconds, self.command)
        if self.folder and trainer.is_global_zero:
            if isinstance(trainer.logger, RunLogger):
                trainer.logger.log_metrics({"hp/val_acc": scores["val/acc"]}, trainer.global_step)
                trainer.logger.save()
            write_result(self.folder, result)
        return result

    def _write_inputs(self, data: Any) -> None:
        assert self.folder
        for path, content in self.kept.items():
            write_atomically(self.folder / path, content)
        (self.folder / "config.yaml").write_text(self.config)
        (self.folder / "splits.csv").write_bytes(splits.to_csv(data.items, data.class_names))
        (self.folder / "skipped.csv").write_bytes(csv_bytes([["path", "reason"], *data.skipped.items()]))

    def _card(self, data: Any) -> str:
        counts = "\n".join(f"| {split} | {len(data.of(split))} |" for split in splits.SPLITS)
        return (
            f"`{self.command}`\n\n| split | images |\n|---|---|\n{counts}\n\n"
            f"{len(data.class_names)} classes, {len(data.skipped)} images left out\n\n"
            f"```yaml\n{self.config}```"
        )


def result_of(
    backbone: FrozenBackbone, data: Any, scores: dict[str, Any], seconds: dict[str, float], command: str
) -> dict[str, Any]:
    """The content of ``result.json``: scores by name, and what they depend on."""
    about: dict[str, Any] = {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "images": {split: len(data.of(split)) for split in splits.SPLITS},
        "classes": len(data.class_names),
        "skipped": len(data.skipped),
        "backbone": backbone.name,
        "weights": backbone.weights,
        "digest": backbone.digest(),
        "command": command,
        "versions": versions(),
    }
    return scores | about


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes ``result.json``, the sign that a run is finished."""
    write_atomically(folder / RESULT, json.dumps(result, indent=2).encode())


def run_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that a checkpoint belongs to; empty where it lies in no run's folder.

    Raises:
        UserError: it is damaged.
    """
    file = checkpoint.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        return {}
    try:
        loaded = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is no YAML any more ({' '.join(str(error).split())})") from error
    return loaded if isinstance(loaded, dict) and "data" in loaded else {}


def files_of_run(checkpoint: Path) -> list[Path]:
    """The images of the run that a checkpoint belongs to; empty where it lies in no run's folder."""
    config, table = run_config(checkpoint), checkpoint.resolve().parent.parent / "splits.csv"
    if not config or not table.is_file():
        return []
    data = config["data"]
    root = Path(data["csv"]).parent if data.get("csv") else Path(data["root"])
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [root / row["path"] for row in csv.DictReader(file)]


def command_line() -> str:
    """What started this process, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    return {
        "headstart": headstart.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pytorch-lightning": version("pytorch-lightning"),
        "pillow": PIL.__version__,
    }
