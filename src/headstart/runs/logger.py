"""TensorBoard in a run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from headstart.errors import UserError

COMPARED = ("val/acc", "val/map", "val/loss", "test/acc", "test/map")


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

    def compare_by(self, settings: Mapping[str, Any]) -> None:
        """Adds the run to TensorBoard's HParams tab, with scores that it logs anyway and no curve of their own."""
        from torch.utils.tensorboard.summary import hparams

        self.hparams.update(settings)  # for hparams.yaml
        plain = {
            name: value if isinstance(value, bool | int | float) else str(value) for name, value in settings.items()
        }
        # The values of the scores are not read here.
        for summary in hparams(plain, dict.fromkeys(COMPARED, 0.0)):  # type: ignore[no-untyped-call]
            self.experiment.file_writer.add_summary(summary)
