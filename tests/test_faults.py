"""What happens when things go wrong, with real faults: torn and forged files, full disks, signals, moved folders."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import REPOSITORY, draw, newest_run
from headstart.checkpoints import SEAL, SealedCheckpointIO, content_digest
from headstart.classifier import TransferClassifier
from headstart.cli import main
from headstart.errors import UserError

SMALL = ["--model.image_size=32", "--report=false"]


def child(*options: str) -> subprocess.Popen:
    """A process with the usual handler of Ctrl-C, which one that was started in the background lacks."""
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from headstart.cli import main; main(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: str, process: subprocess.Popen) -> Path:
    for _ in range(1200):
        if found := next(Path().glob(path), None):
            return found
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_a_flipped_bit_is_refused(colours, train, refused):
    train(colours, "--trainer.max_epochs=1")
    path = newest_run() / "checkpoints/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint[SEAL] == content_digest({name: value for name, value in checkpoint.items() if name != SEAL})
    checkpoint["state_dict"]["head.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(checkpoint, "flipped.ckpt")
    assert "is corrupt (its sha256 differs)" in refused(
        "evaluate", "--ckpt_path=flipped.ckpt", f"--data.root={colours}"
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # somewhere within a tensor
    Path("raw.ckpt").write_bytes(data)
    line = refused("evaluate", "--ckpt_path=raw.ckpt", f"--data.root={colours}")
    assert "corrupt" in line or "damaged" in line


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("forced", [False, True])
def test_no_file_that_is_given_executes_code(colours, forced, refused, monkeypatch):
    if forced:  # the switch that turns torch's own guard off
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name in ("evil.ckpt", "evil.pth"):
        torch.save({"state_dict": Evil(), "headstart": {}}, name)
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    checkpoints = [["--ckpt_path=evil.ckpt"], ["--ckpt_path=evil.pt"]]
    for option in checkpoints:
        for verb in (["evaluate", f"--data.root={colours}"], ["predict", str(colours)], ["export", "--output=a.pth"]):
            refused(verb[0], *option, *verb[1:])
        refused("train", f"--data.root={colours}", *option, *SMALL)
    for weights in ("evil.pth", "evil.pt"):
        refused("train", f"--data.root={colours}", f"--model.weights={weights}", *SMALL)
    refused("evaluate", "--ckpt_path=http://localhost/evil.ckpt", f"--data.root={colours}")
    with pytest.raises(Exception, match=r"(?i)weights"):
        SealedCheckpointIO().load_checkpoint("evil.ckpt", weights_only=False)
    assert not Path("executed").exists()


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path):
    io, path = SealedCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="bytes are needed"):
            io.save_checkpoint({"state_dict": {"a": torch.ones(30_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.zeros(3))
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "pathlib.Path.replace", "headstart.content._flush_folder"])
def test_a_kill_at_each_boundary_of_a_save_leaves_a_whole_checkpoint(tmp_path, where):
    """The second save is killed when it reaches the call; the file is then the first, or the second, whole."""
    module, name = where.rsplit(".", 1)
    owner = "pathlib.Path" if module == "pathlib.Path" else module
    code = f"""
import os, pathlib, signal, torch, headstart.content
from headstart.checkpoints import SealedCheckpointIO
io, path = SealedCheckpointIO(), pathlib.Path({str(tmp_path / "last.ckpt")!r})
io.save_checkpoint({{"state_dict": {{"a": torch.zeros(5)}}}}, path)
{owner}.{name} = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
io.save_checkpoint({{"state_dict": {{"a": torch.ones(5)}}}}, path)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    found = SealedCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["a"]
    second = where == "headstart.content._flush_folder"  # after the rename it is there
    assert torch.equal(found, torch.ones(5) if second else torch.zeros(5))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_their_status_and_the_run_goes_on(colours, train, sent, status):
    options = [f"--data.root={colours}", *SMALL, "--name=run", "--trainer.max_epochs=400"]
    process = child("train", *options)
    last = wait_for("logs/run/*/checkpoints/last.ckpt", process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors[-2000:]
    assert "Traceback" not in errors
    reached = torch.load(last, weights_only=True)["epoch"]
    assert reached < 399
    train(colours, "--name=run", "--trainer.max_epochs=401", "--ckpt_path=last")
    assert torch.load(last, weights_only=True)["epoch"] == 400


def test_a_killed_run_goes_on_in_a_moved_folder_with_its_best_score_and_no_double_point(colours, train, monkeypatch):
    train(colours, "--name=whole", "--trainer.max_epochs=6", "--model.lr=0.5")
    whole = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)

    def stop(self: TransferClassifier) -> None:
        if self.current_epoch == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched:  # after the validation of epoch 3 was logged, before its checkpoint
        patched.setattr(TransferClassifier, "on_train_epoch_end", stop)
        with pytest.raises(RuntimeError, match="killed"):
            train(colours, "--name=run", "--trainer.max_epochs=6", "--model.lr=0.5")
    shutil.move("logs", "moved")
    train(colours, "--name=run", "--trainer.max_epochs=6", "--ckpt_path=last", "--trainer.default_root_dir=moved")
    run = newest_run(Path("moved"))
    assert run.parent.name == "run"
    parts = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert torch.equal(whole["state_dict"]["head.weight"], parts["state_dict"]["head.weight"])
    scores = [
        next(state["best_model_score"] for name, state in found["callbacks"].items() if "val/loss" in name)
        for found in (whole, parts)
    ]
    assert torch.equal(*scores)
    assert not Path("logs").exists()
    events = EventAccumulator(str(run))
    events.Reload()
    steps = [point.step for point in events.Scalars("val/acc")]
    assert len(steps) == len(set(steps)) == 6
    assert json.loads((run / "result.json").read_text())["test/acc"] >= 0


def test_a_run_that_is_finished_is_said_to_be(colours, train, capsys):
    train(colours, "--trainer.max_epochs=2")
    path = newest_run() / "checkpoints/last.ckpt"
    runs = len(list(Path("logs").glob("*/*")))
    assert train(colours, "--trainer.max_epochs=2", f"--ckpt_path={path}") == {}
    assert "already finished" in capsys.readouterr().out
    assert len(list(Path("logs").glob("*/*"))) == runs


def test_strict_refuses_an_image_in_two_splits(tmp_path, refused, train):
    for split, count, seed in (("train", 12, 0), ("val", 4, 1)):
        draw(tmp_path / "data" / split, images=count, seed=seed)
    shutil.copy(tmp_path / "data/train/red/000.png", tmp_path / "data/val/red/copy.png")
    train(tmp_path / "data", "--trainer.max_epochs=1")
    line = refused("train", f"--data.root={tmp_path / 'data'}", "--data.strict=true", *SMALL)
    assert "1 images are in more than one split" in line


def test_a_loss_that_is_no_number_stops_the_run(colours, refused, monkeypatch):
    real = TransferClassifier.training_step

    def broken(self: TransferClassifier, batch):
        return real(self, batch) * (float("nan") if self.current_epoch == 2 else 1.0)

    monkeypatch.setattr(TransferClassifier, "training_step", broken)
    line = refused("train", f"--data.root={colours}", *SMALL, "--trainer.max_epochs=5")
    assert "the loss is not finite in epoch 2: lower --model.lr" in line
    assert torch.load(newest_run() / "checkpoints/best.ckpt", weights_only=True)["epoch"] == 1


def test_python_users_checkpoints_need_no_seal(colours, tmp_path):
    from pytorch_lightning import Trainer

    from headstart import ImageFolderData

    data = ImageFolderData(str(colours))
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(TransferClassifier(data.class_names, image_size=32), data)
    trainer.save_checkpoint("plain.ckpt")
    assert main(["evaluate", "--ckpt_path=plain.ckpt", f"--data.root={colours}", "--report=false"])["test/acc"] > 0.5
