"""What happens when things go wrong, with real faults: torn and forged files, full disks, signals, moved folders."""

import ast
import errno
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headstart import files
from headstart.cli import main
from headstart.data import folders
from headstart.data.loaders import ImageDataset
from headstart.decoding import UnreadableImage, decode
from headstart.errors import UserError
from headstart.features import hashes
from headstart.features.cache import FeatureCache
from headstart.features.matrix import Shard
from headstart.images import Preprocessing
from headstart.model import weights
from headstart.model.classifier import TransferClassifier
from headstart.model.sealed import SEAL, SealedCheckpointIO, content_digest
from support import REPOSITORY, RESNET18, at_most, draw, killed_at, newest_run, without_roots_rights

SMALL = ["--model.image_size=32", "--report=false"]


@pytest.mark.fault("flipped bit in a checkpoint")
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


@pytest.mark.fault("code in an input file")
@pytest.mark.parametrize("forced", [False, True])
def test_no_file_that_is_given_executes_code(colours, forced, refused, monkeypatch):
    if forced:  # the switch that turns torch's own guard off
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name in ("evil.ckpt", "evil.pth"):
        torch.save({"state_dict": Evil(), "headstart": {}}, name)
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    checkpoints = [["--ckpt_path=evil.ckpt"], ["--ckpt_path=evil.pt"]]
    for option in checkpoints:
        refused("evaluate", *option, f"--data.root={colours}")
        refused("predict", *option, str(colours))  # wing: deploy
        refused("export", *option, "--output=a.pth")  # wing: deploy
        refused("train", f"--data.root={colours}", *option, *SMALL)
    for name in ("evil.pth", "evil.pt"):
        refused("train", f"--data.root={colours}", f"--model.weights={name}", *SMALL)
    refused("evaluate", "--ckpt_path=http://localhost/evil.ckpt", f"--data.root={colours}")
    with pytest.raises(Exception, match=r"(?i)weights"):
        SealedCheckpointIO().load_checkpoint("evil.ckpt", weights_only=False)
    assert not Path("executed").exists()


@pytest.mark.fault("full disk")
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


def test_a_killed_run_goes_on_in_a_moved_folder_with_its_best_score_and_no_double_point(colours, train):
    train(colours, "--name=whole", "--trainer.max_epochs=6", "--model.lr=0.5")
    whole = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)

    with killed_at(
        3, TransferClassifier, "on_train_epoch_end"
    ):  # after the validation of epoch 3 was logged, before its checkpoint
        train(colours, "--name=run", "--trainer.max_epochs=6", "--model.lr=0.5")
    shutil.move("logs", "moved")
    train(colours, "--name=run", "--trainer.max_epochs=6", "--ckpt_path=last", "--logs=moved")
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


@pytest.mark.fault("run that has already finished")
def test_a_run_that_is_finished_is_said_to_be(colours, train, capsys):
    train(colours, "--trainer.max_epochs=2")
    path = newest_run() / "checkpoints/last.ckpt"
    runs = len(list(Path("logs").glob("*/*")))
    assert train(colours, "--trainer.max_epochs=2", f"--ckpt_path={path}") == {}
    assert "already finished" in capsys.readouterr().out
    assert len(list(Path("logs").glob("*/*"))) == runs


@pytest.mark.fault("the same image in two splits")
def test_strict_refuses_an_image_in_two_splits(tmp_path, refused, train):
    for split, count, seed in (("train", 12, 0), ("val", 4, 1)):
        draw(tmp_path / "data" / split, images=count, seed=seed)
    shutil.copy(tmp_path / "data/train/red/000.png", tmp_path / "data/val/red/copy.png")
    train(tmp_path / "data", "--trainer.max_epochs=1")
    line = refused("train", f"--data.root={tmp_path / 'data'}", "--data.strict=true", *SMALL)
    assert "1 images are in more than one split" in line


@pytest.mark.fault("loss or gradient that is not finite")
@pytest.mark.parametrize(("step", "said"), [("forward", "loss is"), ("training_step", "gradients are")])
def test_a_loss_that_is_no_number_stops_the_run(step, said, colours, refused, monkeypatch):
    real = getattr(TransferClassifier, step)

    def broken(self: TransferClassifier, batch):
        return real(self, batch) * (float("nan") if self.training and self.current_epoch == 2 else 1.0)

    monkeypatch.setattr(TransferClassifier, step, broken)
    line = refused("train", f"--data.root={colours}", *SMALL, "--trainer.max_epochs=5")
    assert f"the {said} not finite in epoch 2: lower --model.lr" in line
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


@pytest.mark.fault(
    "16 bits per channel",
    "longer than 20 times its width",
    "animated GIF or WebP",
    "folders inside a class folder",
    "formats that PIL cannot read",
    "classes of very different size",
)
def test_what_is_changed_or_left_aside_is_said_once(colours, train, capsys):
    for number in range(2):
        Image.fromarray(np.full((40, 40), 40_000 + number, np.uint16)).save(colours / f"red/deep{number}.png")
        Image.new("RGB", (8, 500 + number), "green").save(colours / f"green/long{number}.png")
        frames = [Image.new("RGB", (20, 20), (20 * number, 0, shade)) for shade in (200, 250)]
        frames[0].save(colours / f"blue/moving{number}.gif", save_all=True, append_images=frames[1:])
    (colours / "red/more").mkdir()
    shutil.move(colours / "red/001.png", colours / "red/more/001.jfif")
    (colours / "red/photo.cr2").write_bytes(b"raw")
    draw(colours, images=220, seed=5, colours={"blue": (40, 60, 200)})
    result = train(colours, "--trainer.max_epochs=1")
    assert sum(result["images"].values()) == 266
    assert result["val/balanced_acc"] != result["val/acc"] or result["val/acc"] == 1
    out = capsys.readouterr().out
    for said in (
        "images of more than 8 bits have values up to 40001; 65535 becomes white",
        "longer than 20 times",
        "only the first frame of animations",
        "1 images are in folders within a class folder",
        "left out: 1 .cr2",
        "--model.class_weights=balanced",
    ):
        assert out.count(said) == 1, said


@pytest.mark.fault("blanks, line breaks and Unicode in names")
def test_a_name_that_is_no_unicode_keeps_its_bytes(colours, train):
    for number in range(20):  # in every split
        (colours / f"red/{number:03}.png").rename(colours / "red" / os.fsdecode(b"caf\xe9 %d.png" % number))
    (colours / "green").rename(colours / "grün, \u2028\n")
    train(colours, *RESNET18, "--trainer.max_epochs=8", "--report=true")
    run = newest_run()
    assert b"caf\xe9 1.png" in (run / "splits.csv").read_bytes()
    assert "caf\\udce9" in (run / "report.html").read_text()
    best = run / "checkpoints/best.ckpt"
    assert main(["evaluate", f"--ckpt_path={best}", "--report=false"])["test/acc"] == 1.0
    main(["predict", f"--ckpt_path={best}", str(colours / "red"), "--output=rows.csv"])  # wing: deploy
    assert Path("rows.csv").read_bytes().count(b"caf\xe9") == 20  # wing: deploy
    assert main(["check", f"--data.root={colours}"])["damaged"] == 0  # wing: audit
    assert main(["export", f"--ckpt_path={best}", "--output=model.pth"])["images"] == 32  # wing: deploy


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.fault("file without permission", "cache folder without permission", "log folder without permission")
def test_what_permissions_forbid_is_said(colours, train, refused, own_cache, capsys):
    (colours / "red/000.png").chmod(0)
    for folder in (own_cache, Path("sealed")):
        folder.mkdir()
        folder.chmod(0o500)
    with without_roots_rights():
        train(colours, "--trainer.max_epochs=1")
        out = capsys.readouterr().out
        options = [f"--data.root={colours}", *SMALL, "--trainer.max_epochs=1"]
        line = refused("train", *options, "--logs=sealed")
    assert "000.png: unreadable: Permission denied" in out
    assert out.count("cannot be written (Permission denied); computed for this run only") == 1
    assert "sealed" in line
    assert "--logs" in line


@pytest.mark.fault("full disk")
def test_a_disk_that_fills_up_during_the_extraction(colours, train, capsys, own_cache, monkeypatch):
    compute = FeatureCache._compute

    def on_a_small_disk(*arguments):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # a piece of the cache has 120,000 bytes
        try:
            compute(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, previous)

    monkeypatch.setattr(FeatureCache, "_compute", on_a_small_disk)
    result = train(colours, *RESNET18, "--trainer.max_epochs=8")
    out = capsys.readouterr().out
    assert out.count("bytes per shard") == 1
    assert result["test/acc"] == 1.0
    assert not [path for path in own_cache.rglob("*") if path.suffix in (".safetensors", ".tmp")]


@pytest.mark.fault("batch larger than the data")
def test_a_batch_may_be_larger_than_the_data(colours, train):
    assert train(colours, "--data.batch_size=4096", "--trainer.max_epochs=30", "--model.lr=0.05")["test/acc"] == 1.0


@pytest.mark.fault("callback that monitors a value that is not logged")
def test_a_monitor_must_be_logged(colours, refused, train):
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor"]
    line = refused("train", f"--data.root={colours}", *SMALL, stopping[0], f"{stopping[1]}=val/los")
    assert "EarlyStopping monitors 'val/los', which is not logged" in line
    assert "val/loss" in line
    assert not Path("logs").exists()
    train(colours, stopping[0], f"{stopping[1]}=val/f1", "--trainer.callbacks.patience=1", "--trainer.max_epochs=3")


def test_all_that_is_said_to_be_logged_is(colours, train):
    train(colours, "--trainer.max_epochs=1")
    events = EventAccumulator(str(newest_run()))
    events.Reload()
    assert set(TransferClassifier(["a", "b"]).logged) <= set(events.Tags()["scalars"])


@pytest.mark.fault("another learning rate for a resumed run")
def test_which_learning_rate_wins_is_said(colours, train, capsys):
    train(colours, "--trainer.max_epochs=2", "--model.lr=0.02")
    last = newest_run() / "checkpoints/last.ckpt"
    capsys.readouterr()
    train(colours, "--trainer.max_epochs=4", "--model.lr=0.5", f"--ckpt_path={last}")
    assert "--model.lr=0.5 has no effect: the optimizer resumes with the checkpoint's 0.02" in capsys.readouterr().out
    state = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["base_lrs"] == [0.02]


@pytest.mark.fault("killed worker process")
def test_a_killed_worker_names_the_option(colours, refused, monkeypatch):
    def killed(self, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ImageDataset, "__getitem__", killed)
    options = "--data.cache=false", "--data.num_workers=1", "--trainer.max_epochs=1"
    line = refused("train", f"--data.root={colours}", *SMALL, *options)
    assert "--data.num_workers" in line
    assert "/dev/shm" in line


@pytest.mark.fault("cache pruned during the run")
def test_a_cache_that_is_pruned_meanwhile(colours, train, monkeypatch):
    write, pruned = FeatureCache._write, []

    def pruning(self, name, shard):
        write(self, name, shard)
        if len(pruned) < 2:
            pruned.append(main(["cache", "prune", "--days=0"])["pruned"])

    wanted = train(colours, "--trainer.max_epochs=3", "--name=whole")
    main(["cache", "prune", "--days=0"])
    monkeypatch.setattr(FeatureCache, "_write", pruning)
    result = train(colours, "--trainer.max_epochs=3", "--name=pruned")
    assert pruned == [1, 1]
    assert result["val/loss"] == wanted["val/loss"]


@pytest.mark.fault("cached features of other images")
def test_cached_features_that_are_wrong_are_found(colours, train, own_cache, capsys):
    """Rows under a right checksum that belong to other images: a fault of whoever wrote them."""
    wanted = train(colours, "--trainer.max_epochs=2")
    (path,) = own_cache.glob("features/*/*.safetensors")
    shard = Shard.open(path)
    swapped = Shard(shard.rows, shard.features.roll(7, 0), shard.failures, shard.seconds).to_bytes()
    path.unlink()
    path.with_name(f"{path.stem[:24]}-{hashlib.sha256(swapped).hexdigest()}.safetensors").write_bytes(swapped)
    assert main(["cache", "verify"])["damaged"] == 0
    assert train(colours, "--trainer.max_epochs=2")["val/loss"] == wanted["val/loss"]
    assert "all are recomputed" in capsys.readouterr().out
    train(colours, "--trainer.max_epochs=2")
    assert "HIT" in capsys.readouterr().out


@pytest.mark.fault("code in an input file")
def test_no_file_that_lies_about_executes_code(colours, train, refused, own_cache, stand_in_for_imagenet, monkeypatch):
    """The cache, the folder of downloaded weights, files to predict, configurations, a run's splits."""
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    evil = pickle.dumps(Evil())
    train(colours, "--trainer.max_epochs=1")
    for path in [*own_cache.glob("features/*/*.safetensors"), *own_cache.glob("index/*"), *own_cache.rglob("key.json")]:
        path.write_bytes(evil)
    train(colours, "--trainer.max_epochs=1")  # damaged, so computed again
    checkpoint = newest_run() / "checkpoints/best.ckpt"
    # wing: deploy
    Path("evil.png").write_bytes(evil)
    assert "none of the 1 files could be read" in refused("predict", f"--ckpt_path={checkpoint}", "evil.png")
    # /wing
    Path("evil.csv").write_bytes(evil)
    refused("train", f"--data.root={colours}", "--data.splits=evil.csv", *SMALL)
    Path("evil.yaml").write_text("model:\n  lr: !!python/object/apply:os.system ['touch executed']\n")
    refused("train", f"--data.root={colours}", "--config=evil.yaml", *SMALL)
    (checkpoint.parent.parent / "config.yaml").write_bytes(Path("evil.yaml").read_bytes())
    refused("evaluate", f"--ckpt_path={checkpoint}")
    torch.save({"conv1.weight": Evil()}, "made.pth")
    hub = Path("torch/hub/checkpoints") / stand_in_for_imagenet.name
    hub.parent.mkdir(parents=True)
    hub.write_bytes(Path("made.pth").read_bytes())
    assert "sha256 differs" in refused("train", f"--data.root={colours}", "--model.weights=imagenet")
    # A file that was made to have the right digits in its hash.
    monkeypatch.setitem(weights.SHA256, hub.name, hashlib.sha256(hub.read_bytes()).hexdigest())
    assert "plain tensors" in refused("train", f"--data.root={colours}", "--model.weights=imagenet")
    assert not Path("executed").exists()


@pytest.mark.fault("image format that would start a program")
def test_no_image_starts_a_program(colours, train, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda self, *given, **options: started.append(given))
    monkeypatch.setattr("subprocess.Popen.__del__", lambda self: None)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n%%EOF\n"
    for name in ("red/drawing.jpg", "red/drawing.eps", "blue/drawing.png"):
        (colours / name).write_bytes(script)
    assert train(colours, "--trainer.max_epochs=1")["skipped"] == 2  # an .eps is no image here
    with pytest.raises(UnreadableImage, match="not an image"):
        decode(script, Preprocessing())
    assert not started


@pytest.mark.fault("FIFO or device in place of a file")
def test_only_regular_files_are_opened(colours, checkpoint, train, refused, monkeypatch, capsys):
    os.mkfifo("fifo")
    (colours / "red/zero.png").symlink_to("/dev/zero")
    os.mkfifo(colours / "blue/fifo.png")
    with at_most(60):
        result = train(colours, "--trainer.max_epochs=1")
        assert result["skipped"] == 2
        out = capsys.readouterr().out
        assert out.count("not a regular file") == 2
        for option in (
            "--config=fifo",
            "--config fifo",
            "--data.splits=fifo",
            "--model.weights=fifo",
            "--ckpt_path=fifo",
        ):
            assert "fifo" in refused("train", f"--data.root={colours}", *option.split(), *SMALL)
        assert "not a regular file" in refused("train", "--data.csv=fifo", *SMALL)
        assert "is not a file" in refused("evaluate", "--ckpt_path=fifo")
        # wing: deploy
        counts = main(["predict", f"--ckpt_path={checkpoint}", "fifo", str(colours / "red"), "--output=rows.csv"])
        assert counts == {"predicted": 20, "errors": 2}
        monkeypatch.setattr(sys, "stdin", io.StringIO("/dev/zero\nfifo\n"))
        assert "none of the 2 files" in refused("predict", f"--ckpt_path={checkpoint}", "--output=none.csv")
        # /wing


@pytest.mark.fault("network disk or memory that fails for a while")
@pytest.mark.parametrize(
    "failure", [OSError(errno.EIO, "Input/output error"), MemoryError(), OSError(errno.EMFILE, "")]
)
@pytest.mark.parametrize("where", ["hashing", "decoding"])
def test_what_may_pass_is_tried_again_and_never_remembered(where, failure, colours, train, refused, monkeypatch):
    """A disk that fails twice costs nothing; one that goes on failing stops the run, and is no fault of the image."""
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    module, name = {"hashing": (hashes, "read_regular"), "decoding": (folders, "decode")}[where]
    works, failures = getattr(module, name), {"left": 0}

    def fails(*given):
        if failures["left"]:
            failures["left"] -= 1
            raise failure
        return works(*given)

    monkeypatch.setattr(module, name, fails)
    failures["left"] = 10**9
    line = refused("train", f"--data.root={colours}", *SMALL)
    assert re.search(r"/colours/\w+/\d+.png: cannot be read now", line)
    assert "try again" in line
    failures["left"] = 2
    assert train(colours, "--trainer.max_epochs=1", "--data.num_workers=1")["skipped"] == 0


@pytest.mark.fault("network disk or memory that fails for a while", "file that vanishes or changes during the run")
def test_what_stops_a_worker_process_is_one_line(colours, refused, monkeypatch):
    works, main_process = folders.decode, os.getpid()

    def fails(*given):
        if os.getpid() != main_process:
            raise MemoryError
        return works(*given)

    monkeypatch.setattr(files, "PAUSES", (0, 0))
    monkeypatch.setattr(folders, "decode", fails)
    with at_most(60):
        line = refused("train", f"--data.root={colours}", "--data.cache=false", "--data.num_workers=1", *SMALL)
    assert re.fullmatch(r"error: \S+\.png: cannot be read now \(out of memory\); this may be temporary.*", line)


def test_a_decoder_without_memory_does_not_call_the_image_damaged(colours, monkeypatch):
    def fails(*given):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(MemoryError):
        decode((colours / "red/000.png").read_bytes(), Preprocessing())


@pytest.mark.fault("folder without permission")
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_folders_that_cannot_be_read_are_named(colours, train, refused, capsys):
    for name in ("red/inner", "blue/inner"):
        (colours / name).mkdir()
        shutil.move(colours / Path(name).parent / "000.png", colours / name / "000.png")
        (colours / name).chmod(0)
    with without_roots_rights():
        assert sum(train(colours, "--trainer.max_epochs=1")["images"].values()) == 58
        out = capsys.readouterr().out
        assert out.count("1 folders cannot be read") == 2
        assert "red/inner (Permission denied)" in out
        colours.chmod(0)
        line = refused("train", f"--data.root={colours}", *SMALL)
        colours.chmod(0o700)
    for name in ("red/inner", "blue/inner"):
        (colours / name).chmod(0o700)
    assert "cannot be read (Permission denied)" in line


@pytest.mark.fault("class without a training image")
def test_a_class_without_a_training_image_is_refused(tmp_path, refused, train, capsys):
    for split in ("train", "val", "test"):
        draw(tmp_path / "data" / split, images=8, seed=len(split))
    for path in (tmp_path / "data/val/green").iterdir():
        path.unlink()
    train(tmp_path / "data", "--trainer.max_epochs=1")
    assert capsys.readouterr().out.count("1 of 3 classes have no image in val, such as 'green'") == 1
    for path in (tmp_path / "data/train/blue").iterdir():
        path.unlink()
    for verb in ("train", "tune"):
        assert "class 'blue': no training image" in refused(verb, f"--data.root={tmp_path / 'data'}", *SMALL)


def test_every_row_of_the_table_of_faults_is_tried():
    rows = re.findall(r"^\| ([^|]+?) \|", (REPOSITORY / "docs/faults.md").read_text(), re.MULTILINE)
    rows = [row for row in rows if row not in ("fault", "---")]
    marks = set()
    for file in (REPOSITORY / "tests").rglob("test_*.py"):
        for call in re.findall(r"^@pytest\.mark\.fault(\(.*?\))$", file.read_text(), re.MULTILINE | re.DOTALL):
            given = ast.literal_eval(call)
            marks |= {given} if isinstance(given, str) else set(given)
    assert len(rows) == len(set(rows))
    assert set(rows) == marks
