"""The compute device, and a Trainer without files or output."""

from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer

from headstart.errors import UserError

# For every Trainer: the data module distributes the images over ranks, each once; a sanity check would draw random
# numbers, so that a resumed run would differ.
COMMON: dict[str, Any] = {
    "deterministic": True,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
QUIET = COMMON | {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def quiet_trainer(accelerator: str = "auto", **options: Any) -> Trainer:
    """A Trainer on one device, without files, progress or messages; ``options`` override these settings."""
    try:
        return Trainer(accelerator=accelerator, **QUIET | options)
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise UserError(f"--accelerator={accelerator}: not available on this machine; use auto") from error


def device_of(accelerator: str) -> torch.device:
    """The device of an accelerator name; auto: the best available."""
    return quiet_trainer(accelerator, deterministic=None).strategy.root_device  # True would be global
