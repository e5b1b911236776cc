"""What needs processes of its own: signals, several runs at once, several devices, the first command of a new user."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from headstart.cli import SEVERAL_PROCESSES, VERBS, main
from headstart.features.matrix import Shard
from support import REPOSITORY, RESNET18, TINY, draw, features, newest_run, rows_of

SMALL = [*TINY, "--report=false"]


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


@pytest.mark.fault("Ctrl-C, SIGTERM")
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


def start(headstart: Path, root: Path, cache: Path, name: str) -> subprocess.Popen[bytes]:
    options = [
        f"--data.root={root}",
        "--model.image_size=32",
        "--trainer.max_epochs=1",
        f"--name={name}",
        "--report=false",
    ]
    environment = os.environ | {"HEADSTART_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.Popen(
        [headstart, "train", *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def together(headstart: Path, root: Path, cache: Path, processes: int) -> int:
    """Rows that so many processes wrote, started together on one cold cache."""
    started = [start(headstart, root, cache, f"run{number}") for number in range(processes)]
    for process in started:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err.decode()[-2000:]
    return sum(len(Shard.open(path).rows) for path in cache.glob("features/*/*.safetensors"))


@pytest.mark.fault("two runs on one cold cache")
def test_processes_share_the_work_and_compute_each_image_once(programs, tmp_path):
    root = draw(tmp_path / "many", images=100)
    assert together(programs / "headstart", root, tmp_path / "shared", 2) == 300
    assert together(programs / "headstart", root, tmp_path / "alone", 1) == 300
    assert features(tmp_path / "shared") == features(tmp_path / "alone")


@pytest.mark.slow
def test_eight_processes_share_one_cold_cache(programs, tmp_path):
    root = draw(tmp_path / "many", images=200)
    assert together(programs / "headstart", root, tmp_path / "shared", 8) == 600
    assert together(programs / "headstart", root, tmp_path / "alone", 1) == 600
    assert features(tmp_path / "shared") == features(tmp_path / "alone")


@pytest.mark.slow  # the tests below have the same in small forms
@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "tune",
        "finetune",  # wing: finetune
    ],
)
def test_a_command_on_two_processes_scores_as_on_one(verb, tmp_path, record_property):
    """The table of docs/cluster.md: the demo, at 64 pixels, three epochs."""
    options = [verb, "--report=false", "--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--name=run"]
    data = [f"--data.root={REPOSITORY / 'data/clipart'}", "--data.feature_precision=fp32"]
    if verb == "finetune":
        main(["train", *data, *RESNET18, "--model.image_size=64", *options[1:], "--logs=heads"])
        head = newest_run(Path("heads")) / "checkpoints/best.ckpt"
        options += [f"--ckpt_path={head}", "--trainer.precision=32-true"]
    else:
        options += [*data, *RESNET18, "--model.image_size=64"]
    main([*options, "--logs=one"])
    environment = os.environ | {"HEADSTART_CACHE": str(tmp_path / "other"), "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-m", "headstart", *options, "--logs=two", "--trainer.devices=2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [next(Path(logs, "run").iterdir()) for logs in ("one", "two")]
    one, two = (json.loads((run / "result.json").read_text()) for run in runs)
    cells = (f"{result['test/acc']:.3f}, {result['test/loss']:.6f}" for result in (one, two))
    record_property("counts", f"| `{verb}` | {' | '.join(cells)} |")
    assert {name: two[name] for name in ("test/acc", "val/acc")} == {
        name: one[name] for name in ("test/acc", "val/acc")
    }
    assert (two["test/loss"], two["val/loss"]) == pytest.approx((one["test/loss"], one["val/loss"]), rel=1e-4)
    heads = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in runs]
    torch.testing.assert_close(*heads, rtol=0, atol=1e-4)
    predicted = [[(row["path"], row["prediction"]) for row in rows_of(run / "predictions.csv")] for run in runs]
    assert predicted[0] == predicted[1]
    assert len(predicted[0]) == one["images"]["test"]


def test_two_processes_end_with_the_head_of_one_for_several_labels(colours):
    paths = sorted(path.relative_to(colours).as_posix() for path in colours.glob("*/*.png"))
    rows = (f"{path},{Path(path).parent.name}{'|odd' if number % 2 else ''}" for number, path in enumerate(paths))
    (colours / "several.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    data = [f"--data.csv={colours}/several.csv", "--data.feature_precision=fp32"]
    options = ["train", *data, *TINY, "--trainer.max_epochs=3", "--report=false", "--trainer.accelerator=cpu"]
    main([*options, "--logs=one"])
    command = [sys.executable, "-m", "headstart", *options, "--trainer.devices=2", "--logs=two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((newest_run(Path(logs)) / "result.json").read_text()) for logs in ("one", "two")]
    found = [{name: value for name, value in own.items() if name.startswith(("val/", "test/"))} for own in results]
    assert found[0]["test/map"] > 0.6
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_two_hosts_with_one_cache_end_where_one_does(checkpoint, tmp_path):
    """Fine-tuning from a cold cache, started by torchrun on each host; both are this machine here."""
    options = ["finetune", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2", "--report=false", "--name=run"]
    options += ["--trainer.precision=32-true", "--data.feature_precision=fp32"]
    one = main([*options, "--logs=one"])
    with socket.socket() as probe:  # a free port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"HEADSTART_CACHE": str(tmp_path / "other"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    options += ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    hosts = [[*command, f"--node_rank={rank}", "-m", "--", "headstart", *options, "--logs=two"] for rank in range(2)]
    pipes = {"stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(host, env=environment, **pipes) for host in hosts]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
    assert [status for _, status in ended] == [0, 0], ended
    (run,) = Path("two/run").iterdir()
    two = json.loads((run / "result.json").read_text())
    assert two["test/acc"] == one["test/acc"]
    assert two["val/loss"] == pytest.approx(one["val/loss"], rel=1e-4)
    rows = sum(len(Shard.open(path).rows) for path in (tmp_path / "other").glob("features/*/*.safetensors"))
    assert rows == 60  # each image once, whichever host computed it


def test_python_is_as_calm_as_the_command_line(colours):
    program = (
        "from pytorch_lightning import Trainer\nfrom headstart import ImageFolderData, TransferClassifier\n"
        f"data = ImageFolderData({str(colours)!r})\nmodel = TransferClassifier(data.class_names, image_size=32)\n"
        "trainer = Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False)\n"
        "trainer.fit(model, datamodule=data)\ntrainer.save_checkpoint('head.ckpt')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [word for word in ("Tip", "eval mode at", "sync_dist", "GPU available") if word in done.stdout]


@pytest.mark.fault("search on several devices")
def test_a_search_is_done_once_and_its_final_run_takes_all_devices(colours):
    options = [f"--data.root={colours}", *SMALL, "--trainer.max_epochs=2", "--name=run", "--tune.lr=[0.01,0.001]"]
    options += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    Path("program.py").write_text("import sys\nfrom headstart.cli import main\nmain(sys.argv[1:])\n")
    command = [sys.executable, "program.py", "tune", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the best 8 of 16 heads") + done.stdout.count("the best 10 of 16 heads") == 1
    assert len(list(Path("logs/run-tune").iterdir())) == len(list(Path("logs/run").iterdir())) == 1
    result = json.loads((newest_run() / "result.json").read_text())
    assert result["test/acc"] == 1.0
    assert result["images_per_epoch"] == result["images"]["train"]
    alone = subprocess.run(command, capture_output=True, text=True, env=environment | {"LOCAL_RANK": "1"}, check=False)
    assert alone.returncode == 2
    assert "instead of torchrun" in alone.stderr


def test_the_demo_reaches_its_floor(tmp_path):
    """`python train.py` in a copy of the repository, as a new user runs it."""
    copy = tmp_path / "copy"
    subprocess.run(["git", "-C", str(REPOSITORY), "checkout-index", "-a", f"--prefix={copy}/"], check=True)
    environment = os.environ | {"PYTHONPATH": str(copy / "src")}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    result = json.loads(next((copy / "logs").glob("clipart/*/result.json")).read_text())
    assert result["test/acc"] > 0.45
    assert result["images"] == {"train": 412, "val": 84, "test": 94}
    for said in ("test", "run:", "tensorboard --logdir", "--data.root="):
        assert said in done.stdout


@pytest.mark.parametrize("verb", sorted({*VERBS} - {*SEVERAL_PROCESSES, "runs", "cache"}))
@pytest.mark.parametrize("processes", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_command_for_one_process_is_refused_under_torchrun_and_srun(verb, processes, refused, monkeypatch):
    monkeypatch.setenv(processes, "2")
    assert f"headstart {verb}: runs in one process" in refused(verb, "--ckpt_path=x.ckpt")
