"""Trackers besides TensorBoard, or instead of it: Weights & Biases, MLflow and CSV files, in a run's folder."""

import logging
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from headstart.errors import UserError
from headstart.model.weights import offline
from headstart.runs.logger import RunLogger
from headstart.terminal import rank, say


class Tracker(Logger):
    """Keeps the place of one of Lightning's loggers until the run's folder is known."""

    name = version = None  # nothing yet, where Lightning asks
    needs: tuple[str, ...] = ()  # modules, and our extra of the same name as the first

    @classmethod
    def check(cls) -> None:
        """Raises ``UserError`` if a package is missing."""
        if [module for module in cls.needs if find_spec(module) is None]:
            extra = cls.needs[0]
            raise UserError(f"--trainer.logger: needs {', '.join(cls.needs)}: pip install -e '.[{extra}]'")

    @abstractmethod
    def made(self, folder: Path) -> Logger:
        """Lightning's logger, which writes into the run's folder."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs nothing."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""


class CSV(Tracker):
    """Scores in a CSV file, with the figures next to it."""

    def made(self, folder: Path) -> Logger:
        return CSVLogger(folder, name="csv")  # a resumed run gets a further version


class MLflow(Tracker):
    """MLflow in a database of the run's folder, or at $MLFLOW_TRACKING_URI."""

    needs = ("mlflow", "sqlalchemy", "alembic")

    def made(self, folder: Path) -> Logger:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # MLflow has given up its folders of files.
        place = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_location": str(folder / "mlflow")}
        given = place if "MLFLOW_TRACKING_URI" not in os.environ else {}
        return MLFlowLogger(folder.parent.name, run_name=folder.name, **given)  # type: ignore[arg-type]


class Wandb(Tracker):
    """Weights & Biases in the run's folder."""

    needs = ("wandb",)

    def made(self, folder: Path) -> Logger:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)
        return WandbLogger(f"{folder.parent.name}-{folder.name}", save_dir=folder, settings=quiet)


# Lightning's names, as --trainer.logger takes them without arguments.
TRACKERS: dict[str, type[Logger]] = {
    "CSVLogger": CSV,
    "MLFlowLogger": MLflow,
    "WandbLogger": Wandb,
    "TensorBoardLogger": RunLogger,
}
OPTION = re.compile(r"(--)?trainer\.logger\+?(=|$)")
BARE = re.compile(rf"(?<![\w.])(?:{'|'.join(TRACKERS)})(?![\w.])")


def in_run_folder(options: Sequence[str]) -> list[str]:
    """The options with our class for each bare name of a logger; one with arguments is left to Lightning."""
    if any(re.match(r"(--)?trainer\.logger\.", option) for option in options):
        return list(options)
    found = []
    for before, word in zip(["", *options], options, strict=False):
        named = OPTION.match(word) or OPTION.fullmatch(before)  # the value may be a word of its own
        found.append(BARE.sub(_path, word) if named else word)
    return found


def _path(found: re.Match[str]) -> str:
    kind = TRACKERS[found[0]]
    if issubclass(kind, Tracker):
        kind.check()
    return f"{kind.__module__}.{kind.__name__}"


def prepare(loggers: Sequence[Logger]) -> None:
    """Checks their packages; keeps W&B offline without a key, for which it would ask, or if the network is forbidden.

    Also for loggers from a configuration file, whose names were not seen among the options.
    """
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.check()
    wanted = any(isinstance(logger, Wandb | WandbLogger) for logger in loggers)
    if not wanted or rank() != 0 or "WANDB_MODE" in os.environ:
        return
    import wandb

    if offline() or not wandb.login(prompt=False, verify=False):
        wandb.setup(wandb.Settings(mode="offline"))  # once it has looked for a key, it no longer reads WANDB_MODE


def show(logger: Logger, images: Mapping[str, Any], report: Path | None) -> None:
    """Gives a tracker the figures, [H, W, 3] of uint8 by name, and the report; TensorBoard has its own."""
    if isinstance(logger, RunLogger):
        return
    pictures = {name: Image.fromarray(pixels) for name, pixels in images.items()}
    if isinstance(logger, CSVLogger):
        for name, picture in pictures.items():
            file = Path(logger.log_dir) / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    if isinstance(logger, MLFlowLogger):
        for name, picture in pictures.items():
            logger.experiment.log_image(logger.run_id, picture, f"{name}.png")
        if report:
            logger.experiment.log_artifact(logger.run_id, str(report))
    if isinstance(logger, WandbLogger):
        for name, picture in pictures.items():
            logger.log_image(name, [picture])
        if report:
            import wandb

            logger.experiment.log({"report": wandb.Html(report.read_text(), inject=False)})


def say_where(logger: Logger, logs: Path) -> None:
    """Says how to look at what a tracker has, and closes it."""
    if isinstance(logger, RunLogger):
        say(f"inspect:  tensorboard --logdir {logs}")
    if isinstance(logger, CSVLogger):
        say(f"inspect:  {Path(logger.log_dir) / 'metrics.csv'}")
    if isinstance(logger, MLFlowLogger):
        say(f"inspect:  mlflow ui --backend-store-uri {logger._tracking_uri}")
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        folder = Path(run.dir).parent
        where = f"wandb sync {folder}    (it is offline: no key, or told to be)" if run.offline else run.url
        run.finish()
        if where:  # there is none where W&B is disabled
            say(f"inspect:  {where}")
