"""TensorBoard in a run's folder."""

from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from headstart.errors import UserError


class RunLogger(TensorBoardLogger):
    """TensorBoard in the run's folder; there is no experiment until ``folder`` is set.

    Lightning asks ``hasattr(logger, "experiment")`` before the data is read, and a run that fails on its data should
    leave no folder behind. In a resumed run TensorBoard drops what a killed process wrote after ``steps_done``.
    """

    def __init__(self, folder: Path | None = None, steps_done: int | None = None) -> None:
        purge: dict[str, Any] = {} if steps_done is None else {"purge_step": steps_done}
        super().__init__(save_dir="", name="", version="", default_hp_metric=False, **purge)
        self.folder = folder

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
        if not self.folder.is_dir():  # else the writer thread would end in a traceback
            raise UserError(f"{self.folder}: was deleted during the run; start again")
        return super().experiment
