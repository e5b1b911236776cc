"""On what to compute: a Trainer that says nothing, and the device that it would take."""

from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer

from headstart.errors import UserError

# Of every Trainer here: the data shares itself out among ranks, each image once, and a sanity check would draw
# random numbers, which would end the exact resume that determinism is for.
COMMON: dict[str, Any] = {
    "deterministic": True,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
QUIET = COMMON | {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def quiet_trainer(accelerator: str = "auto", **options: Any) -> Trainer:
    """A Trainer on one device, without files, progress or messages; further ``options`` of the Trainer's win."""
    try:
        return Trainer(accelerator=accelerator, **QUIET | options)
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise UserError(f"--accelerator={accelerator}: not on this machine; auto takes what it has") from error


def device_of(accelerator: str) -> torch.device:
    """The device of that name, or with auto what the machine has."""
    return quiet_trainer(accelerator, deterministic=None).strategy.root_device  # determinism would hold for all
