"""A run that is resumed: which one, on which images, from which checkpoint, and by one process alone."""

import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from headstart.cli import main
from headstart.model.classifier import TransferClassifier
from headstart.model.sealed import BEST, SEAL, content_digest
from support import TINY, draw, killed_at, newest_run, rows_of

CKPT = "checkpoints/last.ckpt"


@pytest.fixture
def stopped(train):
    """Starts a run that is killed before its third epoch; gives its folder."""

    def start(root: Path, *options: str) -> Path:
        with killed_at(2, TransferClassifier):
            train(root, "--trainer.max_epochs=4", *options)
        return newest_run()

    return start


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of images that a test changes."""
    return draw(tmp_path / "own", images=12)


def split_of(run: Path) -> dict[str, str]:
    return {row["sha256"]: row["split"] for row in rows_of(run / "splits.csv")}


def last(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / CKPT, weights_only=True)["state_dict"]
    return state


def known(run: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(run / BEST, weights_only=True)["headstart"]["known"]
    return content


def test_a_run_killed_when_its_fit_ends_makes_up_for_it(own, train):
    with killed_at(2, TransferClassifier, "on_fit_end"):
        train(own, "--trainer.max_epochs=2")
    run = newest_run()
    assert "known" not in torch.load(run / BEST, weights_only=True)["headstart"]
    train(own, "--ckpt_path=last")
    assert len(known(run)["distances"]) == sum(split == "val" for split in split_of(run).values())


@pytest.mark.fault("images added, deleted or changed before a run is resumed")
def test_a_resumed_run_has_the_images_of_its_own_split(own, train, stopped, capsys):
    train(own, "--trainer.max_epochs=4", "--logs=whole")
    run = stopped(own)
    before = (run / "splits.csv").read_bytes()
    draw(own / "more", images=4, seed=9)
    for folder in sorted((own / "more").iterdir()):
        for path in folder.iterdir():
            path.rename(own / folder.name / f"0_{path.name}")  # earlier in the alphabet than those of the run
        folder.rmdir()
    (own / "more").rmdir()
    train(own, "--ckpt_path=last")
    assert "12 image(s) are not in" in capsys.readouterr().out
    assert (run / "splits.csv").read_bytes() == before
    whole, parts = last(newest_run(Path("whole"))), last(run)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    whole, parts = known(newest_run(Path("whole"))), known(run)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.fault("images added, deleted or changed before a run is resumed")
@pytest.mark.parametrize("change", ["deleted", "changed", "another class"])
def test_a_resumed_run_without_one_of_its_images_is_refused(change, own, stopped, refused):
    stopped(own)
    path = own / "blue/003.png"
    if change == "deleted":
        path.unlink()
    elif change == "changed":
        shutil.copy(own / "blue/004.png", path)
    else:
        path.rename(own / "green/blue.png")
    assert "blue/003.png: is missing, damaged or changed" in refused("train", "--ckpt_path=last")


def test_a_resumed_run_takes_a_renamed_image(own, train, stopped):
    run = stopped(own)
    (own / "blue/003.png").rename(own / "blue/zzz.png")
    assert train(own, "--ckpt_path=last")["images"]["train"] == sum(s == "train" for s in split_of(run).values())


@pytest.mark.fault("images added, deleted or changed before a run is resumed")
def test_a_new_run_from_a_runs_checkpoint_keeps_the_split(own, train, refused):
    train(own, "--trainer.max_epochs=2")
    first = newest_run()
    draw(own / "more", images=4, seed=9)
    for path in sorted((own / "more/blue").iterdir()):
        path.rename(own / f"blue/0_{path.name}")
    shutil.rmtree(own / "more")
    train(own, f"--ckpt_path={first / CKPT}", "--trainer.max_epochs=3")
    second = newest_run()
    assert second != first
    assert split_of(second) == split_of(first)
    main(["train", f"--config={second / 'config.yaml'}", "--report=false"])  # which repeats it on the same images
    assert split_of(newest_run()) == split_of(first)
    (own / "red/000.png").unlink()
    options = f"--data.root={own}", f"--ckpt_path={first / CKPT}", *TINY, "--trainer.max_epochs=4"
    assert "red/000.png: is missing" in refused("train", *options)


@pytest.mark.fault("images added, deleted or changed before a run is resumed")
def test_evaluate_scores_the_runs_own_test_images(own, train, refused):
    result = train(own, "--trainer.max_epochs=2")
    run = newest_run()
    draw(own / "more", images=8, seed=9)
    for path in sorted((own / "more/blue").iterdir()):
        path.rename(own / f"blue/0_{path.name}")
    shutil.rmtree(own / "more")
    rows = rows_of(run / "splits.csv")
    (own / next(row["path"] for row in rows if row["split"] == "train")).unlink()  # no test image, so no matter
    options = "evaluate", f"--ckpt_path={run / 'checkpoints/best.ckpt'}", "--report=false"
    again = main([*options, "--name=again"])
    assert again["images"]["test"] == result["images"]["test"]
    assert again["test/loss"] == pytest.approx(result["test/loss"], rel=1e-5)
    gone = next(row["path"] for row in rows if row["split"] == "test")
    (own / gone).unlink()
    assert f"{gone}: is missing" in refused(*options)


@pytest.mark.fault("--ckpt_path=last among several runs")
def test_the_newest_unfinished_run_of_the_verb_is_resumed(own, colours, train, stopped, refused):
    first = stopped(own, "--name=first [2024]")
    second = stopped(colours, "--name=second")
    train(colours, "--name=first 2", "--trainer.max_epochs=1")  # finished
    main(["train", "--ckpt_path=last", "--name=first [2024]", "--report=false"])
    assert (first / "result.json").exists()
    line = refused("train", "--ckpt_path=last", f"--data.root={own}")
    assert f"no unfinished run of train on {own}" in line
    assert "headstart train --ckpt_path=last --name=second" in line
    assert "named third" in refused("train", "--ckpt_path=last", "--name=third")
    assert not (second / "result.json").exists()
    main(["train", "--ckpt_path=last", "--report=false"])
    assert (second / "result.json").exists()


@pytest.mark.fault("a run that another process is training")
def test_two_processes_do_not_resume_one_run(own, stopped, refused):
    run = stopped(own)
    before = (run / CKPT).read_bytes()
    with FileLock(run / ".lock"):
        assert "another process is training this run" in refused("train", "--ckpt_path=last")
    assert (run / CKPT).read_bytes() == before
    assert "epochs" not in main(["train", "--ckpt_path=last", "--report=false"])


def test_an_interrupted_run_says_the_command_that_resumes_it(own, train, monkeypatch, capsys):
    def interrupt(self: TransferClassifier) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TransferClassifier, "on_train_epoch_start", interrupt)
        with pytest.raises(SystemExit):
            train(own, "--trainer.max_epochs=4", "--name=my run")
    assert "resume:   headstart train --ckpt_path=last '--name=my run'" in capsys.readouterr().out
    main(["train", "--ckpt_path=last", "--name=my run", "--report=false"])


@pytest.mark.fault("--ckpt_path for a search")
def test_a_search_is_not_resumed(own, stopped, refused):
    stopped(own)
    assert "headstart train --ckpt_path=last" in refused("tune", "--ckpt_path=last")


@pytest.mark.fault("more epochs for a finished run")
def test_more_epochs_keep_the_best_and_say_the_leap_of_the_rate(own, train, capsys):
    train(own, "--trainer.max_epochs=3")
    first = newest_run()
    began = torch.load(first / CKPT, weights_only=True)["headstart"]["scores"]["val/loss"]
    capsys.readouterr()
    result = train(own, f"--ckpt_path={first / CKPT}", "--trainer.max_epochs=6", "--model.warmup=0.9")
    assert "the learning rate jumps from" in capsys.readouterr().out
    run = newest_run()
    assert result["val/loss"] <= began
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert best["headstart"]["scores"]["val/loss"] == result["val/loss"]


def test_what_a_run_begins_from_stays_the_best_where_nothing_is_better(own, train, monkeypatch):
    train(own, "--trainer.max_epochs=3")
    first = newest_run()

    def spoil(self: TransferClassifier, *_: object) -> None:
        self.head.bias.data[0] = 1000

    monkeypatch.setattr(TransferClassifier, "on_train_batch_end", spoil)
    monkeypatch.setattr("headstart.fit.run.meet_rival", lambda cli: None)
    train(own, f"--ckpt_path={first / CKPT}", "--trainer.max_epochs=5")
    assert newest_run() != first
    best, begun = (torch.load(path, weights_only=True) for path in (newest_run() / BEST, first / CKPT))
    assert best["headstart"].pop("known")
    del best[SEAL], begun[SEAL]
    assert content_digest(best) == content_digest(begun)
