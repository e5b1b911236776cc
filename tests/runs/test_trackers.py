"""Trackers beside TensorBoard: what they hold is read back from their own stores."""

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from headstart.cli import main
from headstart.errors import UserError
from headstart.runs import trackers
from support import COLOURS, TINY, draw, newest_run, working_in

ALL = "--trainer.logger=[TensorBoardLogger,CSVLogger,MLFlowLogger,WandbLogger]"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that every tracker saw; all tests only read it."""
    folder = tmp_path_factory.mktemp("tracked")
    with working_in(folder), pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_DIR", str(folder))
        root = draw(folder / "mixed", images=12)
        draw(root, images=4, seed=1, colours={"red": COLOURS["green"]})
        main(["train", f"--data.root={root}", *TINY, "--trainer.max_epochs=2", ALL])
    return newest_run(folder / "logs")


@pytest.fixture
def result(run) -> dict:
    return json.loads((run / "result.json").read_text())


def test_csv_has_the_scores_and_the_figures(run, result):
    folder = run / "csv/version_0"
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test/acc"]) for row in rows if row["test/acc"]] == [pytest.approx(result["test/acc"])]
    assert len([row for row in rows if row["val/loss"]]) == 2
    assert "model.lr: 0.003" in (folder / "hparams.yaml").read_text()
    assert np.asarray(Image.open(folder / "test/confusion_matrix.png")).std() > 10


def test_mlflow_has_scores_parameters_and_pictures(run, result):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "mixed"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.metrics["test/acc"] == pytest.approx(result["test/acc"])
    assert found.data.metrics["test/loss"] == pytest.approx(result["test/loss"])
    assert found.data.params["model.lr"] == "0.003"
    assert found.info.run_name == run.name
    picture = Image.open(run / "mlflow" / found.info.run_id / "artifacts/test/confusion_matrix.png")
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(run / "csv/version_0/test/confusion_matrix.png")))
    assert {entry.path for entry in client.list_artifacts(found.info.run_id)} >= {"report.html", "test"}


def wandb_records(file: Path) -> Iterator[Any]:
    """What W&B keeps of a run that is offline: in the log format of LevelDB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_has_scores_parameters_and_pictures(run, result):
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    history, config = {}, {}
    for record in wandb_records(file):
        history |= {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        config |= {"/".join(item.nested_key) or item.key: item.value_json for item in record.config.update}
    assert json.loads(history["test/acc"]) == pytest.approx(result["test/acc"])
    assert json.loads(config["model.lr"]) == 0.003
    (picture,) = file.parent.glob("files/media/images/test/confusion_matrix_*.png")
    expected = Image.open(run / "csv/version_0/test/confusion_matrix.png")
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), np.asarray(expected))
    assert list(file.parent.glob("files/media/html/report_*.html"))


def test_tensorboard_stays_and_messages_name_the_trackers(colours, capsys):
    options = [f"--data.root={colours}", *TINY, "--report=false", "--trainer.max_epochs=1"]
    main(["train", *options, "--trainer.logger=CSVLogger", "--name=table"])
    said = capsys.readouterr().out
    table = newest_run().resolve() / "csv/version_0/metrics.csv"
    assert f"inspect:  {table}" in said
    assert "tensorboard --logdir" not in said
    assert not list(newest_run().glob("events*"))
    main(["train", f"--config={newest_run() / 'config.yaml'}", "--name=again"])  # the configuration keeps the logger
    assert (newest_run() / "csv/version_0/metrics.csv").exists()


@pytest.mark.fault("tracker that is not installed")
def test_a_tracker_that_is_not_installed_is_named(colours, refused, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name, extra in (("MLFlowLogger", "mlflow"), ("WandbLogger", "wandb")):
        line = refused("train", f"--data.root={colours}", *TINY, f"--trainer.logger={name}")
        assert f"pip install -e '.[{extra}]'" in line
        with pytest.raises(UserError, match=extra):  # named in a configuration file
            trackers.prepare([trackers.TRACKERS[name]()])
    line = refused("train", f"--data.root={colours}", *TINY, "--trainer.logger=CometLogger")
    assert "CometLogger: Requirement 'comet-ml" in line


@pytest.mark.parametrize("given", [{}, {"project": "mine"}])
def test_wandb_without_a_key_is_offline_and_asks_nothing(given, tmp_path, monkeypatch):
    for name in ("HEADSTART_OFFLINE", "HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    wandb.teardown()  # what it knows of the environment is forgotten
    logger = WandbLogger(save_dir=tmp_path, **given)
    trackers.prepare([logger])
    assert logger.experiment.offline
    logger.experiment.finish()
    wandb.teardown()


def test_a_logger_with_arguments_is_lightnings():
    given = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here"]
    assert trackers.in_run_folder(given) == given
    assert trackers.in_run_folder(["--trainer.logger", "CSVLogger"])[1] == "headstart.runs.trackers.CSV"
    assert trackers.in_run_folder(["--trainer.logger=my.CSVLogger"]) == ["--trainer.logger=my.CSVLogger"]
