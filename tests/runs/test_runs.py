"""The list of runs."""

import csv
import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from headstart.cli import VERBS, main
from support import TINY, newest_run


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
    assert "contains no runs" in refused("runs")
    train(colours, "--trainer.max_epochs=1")
    assert "--sort=speed: no such column; choose from run, " in refused("runs", "--sort=speed")
    Path("runs.csv").write_text("mine")
    assert "already exists" in refused("runs", "--csv=runs.csv")
    assert Path("runs.csv").read_text() == "mine"


def test_the_list_shows_what_differs_from_the_defaults_and_from_each_other(colours, train, capsys):
    train(colours, "--trainer.max_epochs=1", "--name=usual")
    train(colours, "--trainer.max_epochs=1", "--name=other", "--model.weight_decay=0.5")
    capsys.readouterr()
    main(["runs"])
    shown = capsys.readouterr().out
    assert "weight_decay=0.5" in shown
    assert "weight_decay=0.01" not in shown  # the default
    assert "max_epochs" not in shown  # the same in both
    assert len(shown.splitlines()) <= 10


def test_the_defaults_are_those_of_the_parser():
    from contextlib import redirect_stdout, suppress
    from io import StringIO

    import yaml

    from headstart.files import flat
    from headstart.runs.history import DEFAULTS

    for verb, kept in json.loads(DEFAULTS.read_bytes()).items():
        if verb not in VERBS:  # taken off
            continue
        shown = StringIO()
        with redirect_stdout(shown), suppress(SystemExit):
            main([verb, "--print_config"])
        found = flat(yaml.safe_load(shown.getvalue()))
        assert {name: found.get(name) for name in kept} == kept
        assert found.keys() - kept.keys() == {"data.root"}


def test_open_prints_the_paths_of_the_reports_alone(colours, train, capsys):
    train(colours, "--trainer.max_epochs=1", "--report=true", "--name=with")
    train(colours, "--trainer.max_epochs=1", "--name=without")
    capsys.readouterr()
    main(["runs", "--open"])
    (path,) = capsys.readouterr().out.splitlines()
    assert Path(path).read_text().startswith("<!doctype html>")


def test_two_runs_are_compared_on_the_images_that_both_tested(colours, train, capsys):
    for name, options in {"long": ["--trainer.max_epochs=30", "--model.lr=0.1"], "none": ["--model.lr=1e-9"]}.items():
        train(colours, "--report=true", f"--name={name}", "--model.best_by=val/f1", "--trainer.max_epochs=1", *options)
    tables = [next(Path("logs").glob(f"{name}/*/predictions.csv")) for name in ("none", "long")]
    with tables[0].open(newline="") as one, tables[1].open(newline="") as other:
        pairs = list(zip(csv.DictReader(one), csv.DictReader(other), strict=True))
    right = [[row["class"] == row["prediction"] for row in pair] for pair in pairs]
    gained, lost = right.count([False, True]), right.count([True, False])
    capsys.readouterr()
    main(["runs", "none", str(tables[1].parent), "--page=both.html"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"on {len(pairs)} test images in common, {gained} are right only in the second run and {lost}" in shown
    chance = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert f"p = {chance:.3f}" in shown
    assert "model.lr" in shown
    page = Path("both.html").read_text()
    assert page.count("<svg") >= 8
    assert "Receiver operating characteristic" in page


def test_of_older_runs_the_scores_are_compared_and_a_foreign_drawing_is_left_out(colours, train, capsys, refused):
    for name in ("a", "b"):
        train(colours, "--trainer.max_epochs=1", "--report=true", f"--name={name}")
        next(Path("logs").glob(f"{name}/*/predictions.csv")).unlink()
    report = next(Path("logs").glob("a/*/report.html"))
    bad = '<figure><figcaption>Bad</figcaption><svg onload="alert(1)"><text x="1">1</text></svg></figure>'
    report.write_text(report.read_text() + bad)
    capsys.readouterr()
    main(["runs", "a", "b", "--page=both.html"])
    assert "not tested, since" in capsys.readouterr().out
    assert "alert" not in Path("both.html").read_text()
    assert "already exists" in refused("runs", "a", "b", "--page=both.html")
    assert "two different runs" in refused("runs", "a")
    assert "c: no such run; choose from a/" in refused("runs", "a", "c")
    assert "--page: is for two runs" in refused("runs", "--page=x.html")
    assert "--csv: is for the list of runs" in refused("runs", "a", "b", "--csv=x.csv")


@pytest.mark.fault("result.json with values of other types")
@pytest.mark.parametrize(
    "content", ['{"seconds": "x"}', '{"seconds": {"total": "x"}}', '{"test/acc": [1]}', "[" * 10**5]
)
def test_a_result_of_another_kind_hides_no_run(content, colours, train):
    for name in ("a", "b"):
        train(colours, "--trainer.max_epochs=1", f"--name={name}")
    (newest_run() / "result.json").write_text(content)
    assert len(main(["runs"])) == 2
    assert len(main(["runs", "a", "b"])) == 2


@pytest.mark.fault("logs in the folder of the images")
def test_logs_are_not_the_folder_of_the_images(colours, refused):
    line = refused("train", f"--data.root={colours}", *TINY, f"--logs={colours}")
    assert f"--logs={colours}: is the folder of the images" in line
