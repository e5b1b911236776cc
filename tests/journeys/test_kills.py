"""Chaos: runs that are killed at random moments, and go on to the same bits as the run that nobody killed.

A server process imports everything once and forks a child a run, so that a kill costs a second and not ten. The long
versions (`pytest -m slow tests/chaos -s`) print their figures.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support import COLOURS, REPOSITORY, draw, features

SERVER = """
import json, os, sys
import headstart.data.module, headstart.fit.run
from headstart.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        try:
            main(json.loads(line))
            status = 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            status = 99
        os._exit(status)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
# Saves a checkpoint of zeros, then one of ones, and is killed at the n-th call into C within the write: before or after
# each of open, write, flush, fsync, close, rename and the folder's own open, fsync and close. Then tries the next n.
SAVES = """
import os, signal, sys
from pathlib import Path
import torch
import headstart.model.sealed
from headstart.files import write_atomically
writer, path = headstart.model.sealed.SealedCheckpointIO(), Path(sys.argv[1])

def save(value):
    writer.save_checkpoint({"state_dict": {"a": torch.full((5,), value)}}, path)

def killed_at(number):
    calls = 0
    def count(frame, event, called):
        nonlocal calls
        calls += event in ("c_call", "c_return")
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
    def write(*arguments):
        sys.setprofile(count)
        write_atomically(*arguments)
        sys.setprofile(None)
    headstart.model.sealed.write_atomically = write
    save(1.0)

number, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    number += 1
    save(0.0)
    if (child := os.fork()) == 0:
        killed_at(number)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(float(writer.load_checkpoint(path)["state_dict"]["a"][0]), flush=True)
"""
EPOCHS = 12
SMALL = ["--model.image_size=32", "--report=false", f"--trainer.max_epochs={EPOCHS}"]
TRAIN = ["train", "--data.root=mixed", *SMALL, "--model.lr=0.05"]
FINETUNE = ["finetune", "--ckpt_path=head.ckpt", "--data.root=mixed", *SMALL[1:], "--model.lr=0.001"]  # wing: finetune
# wing: fewshot
TASKS = ["--n_way=2", "--n_query=4", "--episodes=20", "--data.val_episodes=20", "--data.train_episodes=40"]
META = ["fewshot", "--head=projection", "--train", "--data.source=folder", "--data.root=classes", SMALL[0], *TASKS]
# /wing
# Whatever is trained, in each way.
KINDS = {
    "cached": TRAIN,
    "views": [*TRAIN, "--data.views=3", "--data.augment=light"],
    "several labels": [*(each for each in TRAIN if "data.root" not in each), "--data.csv=several.csv"],
    "images": [*TRAIN, "--data.cache=false", "--data.augment=strong", "--data.num_workers=1"],
    "fine-tuning": [*FINETUNE, "--data.augment=light", "--data.views=2", "--batch_norm=train"],  # wing: finetune
    "meta-training": [*META, f"--max_epochs={EPOCHS}", f"--patience={EPOCHS}"],  # wing: fewshot
}


class Runs:
    """Runs in forked children."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *options: str, kill_after: float | None = None) -> int:
        """Runs to the end, or to the kill; gives the status, negative if a signal ended it."""
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps(options) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        if kill_after is not None:
            timer = threading.Timer(kill_after, kill, [pid])
            timer.start()
        status = int(self.server.stdout.readline())
        if kill_after is not None:
            timer.cancel()
        return os.waitstatus_to_exitcode(status)


def kill(pid: int) -> None:
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def runs(tmp_path) -> Iterator[Runs]:
    folder = draw(tmp_path / "mixed", images=24)
    draw(folder, images=8, seed=1, colours={"red": COLOURS["green"]})
    for number in range(10):
        draw(tmp_path / "classes", images=12, seed=number, colours={f"class{number}": (25 * number, 90, 128)})
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in folder.glob("*/*.png"))
    labels = (f"{Path(path).parent.name}|{'odd' if number % 2 else 'even'}" for number, path in enumerate(paths))
    rows = (f"{path},{label}" for path, label in zip(paths, labels, strict=True))
    Path("several.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    started = Runs()
    assert started(*TRAIN, "--name=start", "--trainer.max_epochs=2") == 0
    shutil.copy(next(Path("logs/start").glob("*/checkpoints/best.ckpt")), "head.ckpt")
    yield started
    started.server.stdin.close()
    started.server.wait(timeout=30)
    started.server.stdout.close()


def state(folder: Path) -> dict:
    """What has to be the same: head, optimizer, schedule and best score."""
    found = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    scores = (values.get("best_model_score") for values in found["callbacks"].values())
    best = next(score for score in scores if score is not None)  # that of best.ckpt; last.ckpt has none
    names = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
    return {name: found[name] for name in names} | {"best": best}


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def kill_trainings(runs: Runs, kind: str, kills: int, seed: int) -> tuple[int, int]:
    """Kills runs until so many had a checkpoint and epochs left; gives how many of those ended identical."""
    options = KINDS[kind]
    runs(*options, "--name=warm")
    started = time.perf_counter()
    assert runs(*options, "--name=whole") == 0
    takes = time.perf_counter() - started
    wanted = state(next(Path("logs/whole").iterdir()))
    generator, counted, identical = random.Random(seed), 0, 0
    while counted < kills:
        shutil.rmtree("logs/killed", ignore_errors=True)
        runs(*options, "--name=killed", kill_after=generator.uniform(0.1, takes))
        folder = next(Path("logs/killed").glob("*"), None)
        last = folder / "checkpoints/last.ckpt" if folder else None
        if last is None or not last.exists() or (folder / "result.json").exists():
            continue
        if torch.load(last, weights_only=True)["epoch"] >= EPOCHS - 1:
            continue
        counted += 1
        assert runs(*options, "--name=killed", "--ckpt_path=last") == 0
        identical += same(state(folder), wanted) and len(list(Path("logs/killed").iterdir())) == 1
    return counted, identical


def kill_extractions(runs: Runs, kills: int, seed: int) -> tuple[int, int, int]:
    """Kills runs on an empty cache before their fit; gives kills, those amid shards, and the identical ends, in which
    head, optimizer and every row of features are the same."""
    runs(*TRAIN, "--name=warm", "--data.cache_dir=warm")
    started = time.perf_counter()
    assert runs(*TRAIN, "--name=whole", "--data.cache_dir=whole") == 0
    takes = time.perf_counter() - started
    wanted = state(next(Path("logs/whole").iterdir())), features(Path("whole"))
    generator, counted, amid, identical = random.Random(seed), 0, 0, 0
    while counted < kills:
        for folder in ("logs/killed", "killed"):
            shutil.rmtree(folder, ignore_errors=True)
        options = (*TRAIN, "--name=killed", "--data.cache_dir=killed")
        runs(*options, kill_after=generator.uniform(0.05, 0.8 * takes))
        if Path("logs/killed").exists():  # the fit had begun
            continue
        counted += 1
        amid += any(Path("killed").rglob("*.safetensors")) or any(Path("killed").rglob("*.tmp"))
        assert runs(*options) == 0
        identical += same((state(next(Path("logs/killed").iterdir())), features(Path("killed"))), wanted)
    return counted, amid, identical


@pytest.mark.fault("kill -9")
@pytest.mark.parametrize("kind", ["cached", "several labels", "images"])
def test_a_killed_training_ends_with_the_same_bits(runs, kind):
    assert kill_trainings(runs, kind, kills=2, seed=1) == (2, 2)


@pytest.mark.fault("kill -9")
def test_a_killed_extraction_ends_with_the_same_bits(runs):
    counted, _, identical = kill_extractions(runs, kills=3, seed=1)
    assert counted == identical == 3


@pytest.mark.fault("kill -9")
def test_a_kill_at_every_boundary_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-c", SAVES, str(tmp_path / "last.ckpt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]  # each was read, and its seal compared
    *found, last = map(float, done.stdout.split())
    renamed = found.index(1.0)
    assert found == [0.0] * renamed + [1.0] * (len(found) - renamed)
    assert last == 1.0  # nothing left to kill at
    assert renamed > 10
    print(f"\na save: {len(found)} kills, {renamed} left the checkpoint before, {len(found) - renamed} the new one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("cached", 100),
        ("views", 60),
        ("several labels", 20),
        ("images", 40),
        ("fine-tuning", 30),  # wing: finetune
        ("meta-training", 30),  # wing: fewshot
    ],
)
def test_many_killed_trainings(runs, kind, kills):
    counted, identical = kill_trainings(runs, kind, kills, seed=2)
    print(f"\ntraining, {kind}: {counted} kills, {identical} ended with the same bits")
    assert counted == identical == kills


@pytest.mark.slow
def test_many_killed_extractions(runs):
    counted, amid, identical = kill_extractions(runs, kills=100, seed=2)
    print(f"\nextraction: {counted} kills ({amid} after a first piece was begun), {identical} ended with the same bits")
    assert counted == identical == 100
