"""Meta-training: an ordinary fit of a head over episodes, kept only if it helps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn

from headstart.device import quiet_trainer
from headstart.fewshot.compare import accuracies
from headstart.fewshot.data import EpisodeData
from headstart.fewshot.episodes import EpisodeSampler
from headstart.fewshot.module import MetaLearner
from headstart.model.sealed import SealedCheckpointIO, read_sealed, run_checkpoints
from headstart.runs.folder import RunFolder
from headstart.runs.logger import RunLogger
from headstart.search.intervals import mean_and_half_width
from headstart.terminal import say

# Shares of what was meta-trained, of which validation on another domain chooses; without one, the second at most.
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)


def make_trainer(accelerator: str, **options: Any) -> Trainer:
    """A quiet Trainer without inference mode, in which gradients of the inner loop can silently be zero."""
    return quiet_trainer(
        accelerator, inference_mode=False, plugins=[SealedCheckpointIO()], log_every_n_steps=1, **options
    )


def meta_train(
    module: MetaLearner,
    data: EpisodeData,
    accelerator: str,
    run_folder: RunFolder,
    max_epochs: int,
    patience: int,
    seed: int,
    checkpoint: Path | None,
    shares: Sequence[float],
    third: EpisodeSampler | None,
) -> tuple[Trainer, float]:
    """Meta-trains the head; the module keeps the state with the best validation, be it the untrained one.

    Stops after ``patience`` epochs without better validation. With ``shares``, keeps one of them of what was learnt.
    Returns the trainer and the validation accuracy before.
    """
    seed_everything(seed, workers=True, verbose=False)
    before = make_trainer(accelerator).validate(module, data, verbose=False)[0]["val/acc"]
    untrained = {name: tensor.clone().cpu() for name, tensor in module.head.state_dict().items()}
    best, last = run_checkpoints(run_folder.resumed is not None, monitor="val/acc", mode="max")
    made = read_sealed(checkpoint, run_folder.logs) if checkpoint else None
    trainer = make_trainer(
        accelerator,
        logger=RunLogger(steps_done=made["global_step"] if made and run_folder.resumed else None),
        callbacks=[run_folder, EarlyStopping("val/acc", mode="max", patience=patience), best, last],
        enable_checkpointing=True,
        max_epochs=max_epochs,
        default_root_dir=str(run_folder.logs),
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    after = float(best.best_model_score or 0)
    if after > before or shares:
        state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)
        if shares:
            keep_share(module.head, untrained, shares, third or data.sampler("val"), data.val_episodes)
    else:
        module.head.load_state_dict(untrained)
        say(
            f"fewshot: meta-training did not help (val/acc {before:.3f}, then {after:.3f} at best); untrained head kept"
        )
    return trainer, before


def keep_share(
    head: nn.Module, untrained: Mapping[str, Tensor], shares: Sequence[float], sampler: EpisodeSampler, episodes: int
) -> None:
    """Shrinks the head towards the untrained one: the smallest share that validates no worse than the best one.

    No worse: the paired difference is within its 95 % interval.
    """
    trained, found = {name: tensor.cpu().clone() for name, tensor in head.state_dict().items()}, dict[float, Tensor]()
    head.to(sampler.device)

    def take(share: float) -> None:
        head.load_state_dict({name: untrained[name].lerp(tensor, share) for name, tensor in trained.items()})

    for share in shares:
        take(share)
        found[share] = accuracies(head, sampler, episodes)
    best = max(found.values(), key=lambda each: float(each.mean()))
    differences = {share: mean_and_half_width(best - each) for share, each in found.items()}
    kept = min(share for share, (mean, half_width) in differences.items() if mean <= half_width)
    take(kept)
    gain, half_width = mean_and_half_width(found[kept] - found[shares[0]])
    say(f"fewshot: {kept:.0%} of what was meta-trained is kept, by validation (gain {gain:+.3f} ± {half_width:.3f})")
