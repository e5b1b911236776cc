"""The exact optimum beside the trained head: which one becomes best.ckpt, and what that checkpoint holds."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from headstart import TransferClassifier
from headstart.cli import main
from headstart.data.module import ImageFolderData
from headstart.fit.rival import has_rival, is_kept, validation_rank
from headstart.model.calibration import fit_temperature
from headstart.model.checkpoints import read_checkpoint
from support import COLOURS, draw, killed_at, newest_run

BEST = "checkpoints/best.ckpt"
SLOW = ["--model.lr=1e-5", "--trainer.max_epochs=12"]  # so that the exact optimum is the better head


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A problem that is not learnt to the end: a third of a class looks like another."""
    root = draw(tmp_path / "mixed", images=14)
    return draw(root, images=5, seed=1, colours={"red": COLOURS["green"]})


def head_of(run: Path) -> torch.Tensor:
    head: torch.Tensor = read_checkpoint(run / BEST)["state_dict"]["head.weight"]
    return head


@pytest.mark.fault("a run resumed from an exact head, which has no optimizer")
def test_the_better_head_is_kept_with_its_own_scores(mixed, train, refused, capsys):
    result = train(mixed, *SLOW)
    run = newest_run()
    content = read_checkpoint(run / BEST)
    assert result["head"] == content["headstart"]["head"]
    assert result["head"].startswith("exact optimum, L2 ")
    assert f"head:     {result['head']}" in capsys.readouterr().out
    module = TransferClassifier.load_from_checkpoint(run / BEST)
    data = ImageFolderData(str(mixed), splits=str(run / "splits.csv"))
    data.load(module.backbone, torch.device("cpu"))
    val = data.labelled("val")
    logits = module(val.views[0].whole()).detach()
    assert result["val/loss"] == pytest.approx(float(functional.cross_entropy(logits, val.labels)), rel=1e-4)
    assert content["headstart"]["scores"]["val/loss"] == result["val/loss"]
    assert module.task.temperature == pytest.approx(fit_temperature(logits, val.labels), rel=1e-4)
    events = EventAccumulator(str(run))
    events.Reload()
    losses = [event.value for event in events.Scalars("val/loss")]
    assert len(losses) == 12  # the epochs' alone
    assert result["val/loss"] < min(losses)
    line = refused("train", f"--data.root={mixed}", f"--ckpt_path={run / BEST}", "--trainer.max_epochs=20")
    assert "no optimizer to resume" in line
    assert "last.ckpt" in line
    done = main(
        ["finetune", f"--ckpt_path={run / BEST}", "--unfreeze=layer4", "--trainer.max_epochs=1", "--report=false"]
    )
    assert done["before/test/loss"] == pytest.approx(result["test/loss"], rel=1e-3)
    assert done["head"] == "epoch 0"


def test_a_resumed_run_ends_with_the_same_exact_head(mixed, train):
    train(mixed, *SLOW, "--logs=whole")
    whole = newest_run(Path("whole"))
    with killed_at(5, TransferClassifier):
        train(mixed, *SLOW)
    train(mixed, "--ckpt_path=last")
    assert torch.equal(head_of(newest_run()), head_of(whole))
    before = (whole / BEST).read_bytes()
    (whole / "result.json").unlink()  # as if killed after the exact head was kept
    train(mixed, "--ckpt_path=last", "--logs=whole")
    assert (whole / BEST).read_bytes() == before


def test_too_few_epochs_leave_it_out_and_say_so(colours, train, capsys):
    assert train(colours, "--trainer.max_epochs=1")["head"] == "epoch 0"
    assert "more than 20 passes over the features" in capsys.readouterr().out


def test_a_rival_that_is_no_better_changes_nothing(colours, train, monkeypatch):
    monkeypatch.setattr("headstart.fit.rival.is_kept", lambda *_: False)
    result = train(colours, "--trainer.max_epochs=8")
    content = read_checkpoint(newest_run() / BEST)
    assert result["head"] == f"epoch {content['epoch']}"
    assert "optimizer_states" in content


class OwnLoss(TransferClassifier):
    """Another loss, of which the exact optimum of cross entropy is no rival."""

    def configure_loss(self):
        return functional.multi_margin_loss


@pytest.mark.parametrize(
    ("kind", "head", "cache", "limit", "wanted"),
    [
        (TransferClassifier, "linear", True, 1.0, True),
        (TransferClassifier, "mlp", True, 1.0, False),
        (TransferClassifier, "linear", False, 1.0, False),
        (TransferClassifier, "linear", True, 3, False),
        (OwnLoss, "linear", True, 1.0, False),
    ],
)
def test_what_has_a_rival(kind, head, cache, limit, wanted):
    module = kind(["a", "b"], "timm/test_resnet", "random", 32, head=head)
    data = SimpleNamespace(store=SimpleNamespace(cache=cache))
    trainer = SimpleNamespace(limit_train_batches=limit, limit_val_batches=1.0, overfit_batches=0.0)
    assert has_rival(module, data, trainer) == wanted


def test_the_score_that_chooses_can_be_another(mixed, train):
    train(mixed, "--trainer.max_epochs=8", "--model.best_by=val/f1", "--model.head=mlp", "--model.lr=0.3")
    events = EventAccumulator(str(newest_run()))
    events.Reload()
    scores = [event.value for event in events.Scalars("val/f1")]
    assert max(scores) > min(scores)
    assert read_checkpoint(newest_run() / BEST)["epoch"] == scores.index(max(scores))


def test_the_trained_head_must_lead_by_more_than_a_standard_error():
    module = TransferClassifier(["a", "b"], "timm/test_resnet", "random", 32)
    labels, noise = torch.zeros(50, dtype=torch.long), torch.randn(50, generator=torch.Generator().manual_seed(0))
    exact, zero = torch.zeros(50, 2), torch.zeros(50)
    for lead, kept in ((-0.5, True), (0.05, True), (1.0, False)):
        trained = torch.stack([noise - noise.mean() + lead, zero], dim=1)
        gain = functional.cross_entropy(trained, labels, reduction="none") - functional.cross_entropy(exact, labels)
        assert is_kept(module, trained, exact, labels) == kept
        assert kept == (float(gain.mean()) > -float(stats.sem(gain)))


@pytest.mark.parametrize(("best_by", "wanted"), [("val/loss", 0), ("val/balanced_acc", 1), ("val/f1", 1)])
def test_heads_are_ranked_by_that_score(best_by, wanted):
    sure_of_one_class = torch.tensor([[3.0, 0.0], [3, 0], [3, 0], [0.1, 0]])
    unsure_of_both = torch.tensor([[0.1, 0.0], [0.1, 0], [0, 0.1], [0, 0.1]])
    module = TransferClassifier(["a", "b"], "timm/test_resnet", "random", 32, best_by=best_by)
    ranks = [validation_rank(module, each, torch.tensor([0, 0, 0, 1])) for each in (sure_of_one_class, unsure_of_both)]
    assert ranks.index(min(ranks)) == wanted
