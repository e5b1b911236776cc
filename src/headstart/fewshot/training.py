"""Meta-training: an ordinary fit of a head over episodes, kept only if it helps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping

from headstart.fewshot.data import EpisodeData
from headstart.fewshot.module import MetaLearner
from headstart.model.checkpoints import RunCheckpoint, SealedCheckpointIO, read_sealed
from headstart.runs.folder import RunFolder, RunLogger
from headstart.terminal import say


@dataclass(frozen=True)
class Schedule:
    """How long to meta-train.

    Attributes:
        max_epochs: at most.
        patience: epochs without a better validation, after which it stops.
        seed: of the initial values.
    """

    max_epochs: int = 20
    patience: int = 5
    seed: int = 0


def make_trainer(
    accelerator: str, logger: Any = False, callbacks: list[Callback] | None = None, **options: Any
) -> Trainer:
    """A Trainer on one device. Inference mode is off: within it gradients of the inner loop can be zero, silently.

    Args:
        accelerator: cpu, gpu, auto, or whatever Lightning knows.
        logger: None: no logger.
        callbacks: of the run.
        options: more of the Trainer's.
    """
    return Trainer(
        accelerator=accelerator,
        devices=1,
        logger=logger,
        callbacks=callbacks,
        deterministic=True,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        plugins=[SealedCheckpointIO()],
        enable_model_summary=False,
        **{"enable_progress_bar": False, "log_every_n_steps": 1} | options,
    )


def meta_train(
    module: MetaLearner,
    data: EpisodeData,
    schedule: Schedule,
    accelerator: str,
    run_folder: RunFolder,
    checkpoint: Path | None = None,
) -> tuple[Trainer, float]:
    """Trains the head, and leaves in the module what validates best: the untrained head included.

    Args:
        module: with a head that learns.
        data: loaded.
        schedule: how long.
        accelerator: as of the Trainer.
        run_folder: where checkpoints and curves go.
        checkpoint: of the run to go on from.

    Returns:
        The trainer, and the validation accuracy of the head before.
    """
    seed_everything(schedule.seed, workers=True, verbose=False)
    before = make_trainer(accelerator, enable_checkpointing=False).validate(module, data, verbose=False)[0]["val/acc"]
    untrained = {name: tensor.clone() for name, tensor in module.head.state_dict().items()}
    best = RunCheckpoint(filename="best", monitor="val/acc", mode="max", enable_version_counter=False)
    last = RunCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    best.moved = last.moved = run_folder.resumed is not None
    made = read_sealed(checkpoint, run_folder.logs) if checkpoint else None
    stop = EarlyStopping("val/acc", mode="max", patience=schedule.patience)
    trainer = make_trainer(
        accelerator,
        RunLogger(made["global_step"] if made and run_folder.resumed else None),
        [run_folder, stop, best, last],
        max_epochs=schedule.max_epochs,
        default_root_dir=str(run_folder.logs),
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    after = float(best.best_model_score or 0)
    if after > before:
        state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)
    else:
        module.head.load_state_dict(untrained)
        say(f"fewshot: meta-training did not help (val/acc {before:.3f} before, {after:.3f} at best): the head stays")
    return trainer, before
