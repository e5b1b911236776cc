"""The list of runs."""

import csv
import json
from pathlib import Path

from headstart.cli import main


def test_runs_are_listed_the_best_first_with_what_differs(colours, train, capsys):
    train(colours, "--name=long", "--trainer.max_epochs=20")
    train(colours, "--name=short", "--trainer.max_epochs=1", "--model.lr=0.0001")
    best = next(Path("logs/long").glob("*/checkpoints/best.ckpt"))
    main(["evaluate", f"--ckpt_path={best}", f"--data.root={colours}", "--report=false", "--name=scored"])
    next(Path("logs/short").glob("*/result.json")).rename("kept.json")  # as if it had been killed
    unfinished = main(["runs"])
    assert [row["state"] for row in unfinished] == ["finished", "finished", "unfinished"]
    Path("kept.json").rename(next(Path("logs/short").iterdir()) / "result.json")
    capsys.readouterr()
    rows = main(["runs", "--csv=runs.csv", "--sort=val/acc"])
    assert [row["run"].split("/")[0] for row in rows] == ["long", "short", "scored"]
    assert rows[0]["model.lr"] == 0.003
    assert rows[1]["model.lr"] == 0.0001
    assert "model.weight_decay" not in rows[0]  # the same in all that have it
    result = json.loads(next(Path("logs/long").glob("*/result.json")).read_text())
    with Path("runs.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert float(written[0]["test/acc"]) == result["test/acc"]
    assert written[1]["trainer.max_epochs"] == "1"
    shown = capsys.readouterr().out
    assert "lr=0.0001" in shown
    assert "max_epochs=20" in shown


def test_losses_are_best_when_low(colours, train):
    train(colours, "--name=long", "--trainer.max_epochs=20")
    train(colours, "--name=short", "--trainer.max_epochs=1")
    assert [row["run"].split("/")[0] for row in main(["runs", "--sort=test/loss"])] == ["long", "short"]


def test_a_mistake_is_one_line(colours, train, refused):
    assert "no runs in there" in refused("runs")
    train(colours, "--trainer.max_epochs=1")
    assert "--sort=speed: no such column; choose from run, " in refused("runs", "--sort=speed")
    Path("runs.csv").write_text("mine")
    assert "is there already" in refused("runs", "--csv=runs.csv")
    assert Path("runs.csv").read_text() == "mine"
