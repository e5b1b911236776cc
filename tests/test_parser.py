"""Options as people type them, and configuration files with mistakes in them."""

import os
from pathlib import Path

import pytest
import yaml

from headstart.cli import HELP, VERBS, main
from support import at_most, draw, newest_run

DRY = ["--model.image_size=32", "--trainer.fast_dev_run=true"]


@pytest.mark.fault("configuration with a mistake")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model:\n  lrr: 1\n", "a.yaml, line 2: --model.lrr: no such option; did you mean --model.lr?"),
        ("model.lrr: 1\n", "a.yaml, line 1: --model.lrr: no such option; did you mean --model.lr?"),
        ("nam: x\n", "a.yaml, line 1: --nam: no such option; did you mean --name?"),
        ("model:\n  lr: fast\n", "a.yaml, line 2: --model.lr: 'fast': is not a number"),
        ("# rates\nmodel:\n  lr: 9999\n", "a.yaml, line 3: --model.lr: 9999: must be a number >0 and <=1000"),
        ("data: 3\n", "a.yaml, line 1: --data: is a group of options; write them indented below it"),
        ("model:\n  lr: 1\n  lr: 2\n", "a.yaml, line 3: lr is already in line 2; keep one"),
        ("trainer:\n  callbacks: [{a: 1, a: 2}]\n", "a.yaml, line 2: a is already in line 2; keep one"),
        ("", "a.yaml: is empty; add options, such as `model: {lr: 0.01}`"),
        ("# nothing\n", "a.yaml: is empty; add options, such as `model: {lr: 0.01}`"),
        ("- model\n", "a.yaml: contains no options; write them as `name: value`"),
        ("model:\n  lr: 1\n wd: 2\n", "a.yaml, line 3: not YAML (expected <block end>, but found"),
        ("[" * 3000, "a.yaml: not YAML (maximum recursion depth exceeded"),
        (b"# caf\xe9\nmodel: {}\n", "a.yaml, line 1: not UTF-8; save the file as UTF-8"),
        (b"\xff\xfem\0", "a.yaml, line 1: not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_mistake_in_a_configuration_is_named_by_file_and_line(content, said, colours, refused):
    Path("a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused("train", f"--data.root={colours}", "--config=a.yaml", *DRY)


def test_every_verb_checks_its_configuration(refused):
    Path("a.yaml").write_text("nonsense: 1\n")
    for verb in VERBS:
        assert "a.yaml, line 1: --nonsense: no such option" in refused(verb, "--config", "a.yaml")


def test_a_value_of_the_command_line_is_not_the_files(colours, refused):
    Path("a.yaml").write_text("model: {lr: 0.1}\n")
    line = refused("train", f"--data.root={colours}", "--config=a.yaml", "--model.lr=fast", *DRY)
    assert line == "error: --model.lr: 'fast': is not a number"


def test_aliases_merges_and_dotted_names_are_yaml_too(colours):

    Path("a.yaml").write_text("model: &m\n  lr: 0.5\n  <<: *m\ndata.limit: 5\n")
    main(
        [
            "train",
            f"--data.root={colours}",
            "--config=a.yaml",
            "--model.image_size=32",
            "--report=false",
            "max_epochs=1",
        ]
    )
    made = yaml.safe_load((newest_run() / "config.yaml").read_text())
    assert (made["model"]["lr"], made["data"]["limit"]) == (0.5, 5)


@pytest.mark.fault("FIFO or device in place of a file")
@pytest.mark.parametrize("options", [["--model=fifo"], ["--model", "fifo"], ["-c", "fifo"], ["trainer=fifo"]])
def test_a_group_is_read_from_regular_files_alone(options, colours, refused):
    os.mkfifo("fifo")
    with at_most(30):
        assert "fifo: cannot be read (not a regular file)" in refused("train", f"--data.root={colours}", *options)


@pytest.mark.fault("checkpoint or configuration that repeats a value without end")
def test_aliases_that_stand_for_too_much_are_refused(colours, train, refused, capsys):
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{number}: &a{number} [{','.join([f'*a{number - 1}'] * 10)}]" for number in range(1, 10)]
    Path("bomb.yaml").write_text("model:\n  class_weights:\n    " + "\n    ".join(lines))
    with at_most(30):
        assert "aliases stand for more than" in refused("train", f"--data.root={colours}", "--config=bomb.yaml")
        train(colours, "--trainer.max_epochs=1")
        (newest_run() / "config.yaml").write_bytes(Path("bomb.yaml").read_bytes())
        assert main(["runs"])[0]["state"] == "finished"


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """The words as jsonargparse gets them."""
    with monkeypatch.context() as patched:
        seen: list[list[str]] = []
        patched.setattr(
            "jsonargparse.ArgumentParser.parse_args", lambda self, args, *_, **__: seen.append(args) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            main(list(words))
        return seen[0]


@pytest.mark.parametrize(
    ("words", "means"),
    [
        ("train trainer.max_epochs=5 model.lr=0.01", "--trainer.max_epochs=5 --model.lr=0.01"),
        ("train max_epochs=5 lr=0.01 name=a=b", "--trainer.max_epochs=5 --model.lr=0.01 --name=a=b"),
        ("train --name a=b --lr c=d", "--name a=b --lr c=d"),  # values of the options before them
        (
            "train trainer.callbacks+=A trainer.callbacks.monitor=x",
            "--trainer.callbacks+=A --trainer.callbacks.monitor=x",
        ),
        ("train trainer.default_root_dir=x", "--logs=x"),
        ("tune tune.lr=[0.1] draws=3 folds=2", "--tune.lr=[0.1] --tune.draws=3 --folds=2"),
        ("evaluate ckpt_path=a root=b", "--ckpt_path=a --data.root=b"),
        ("runs logs=x sort=y", "--logs=x --sort=y"),
        ("cache prune days=3", "prune --days=3"),
    ],
)
def test_options_may_be_typed_without_dashes(words, means, monkeypatch):
    assert parsed(monkeypatch, *words.split()) == means.split()


@pytest.mark.wing("fewshot", "audit", "finetune", "deploy")
def test_options_of_the_wings_may_be_typed_without_dashes(monkeypatch):
    assert parsed(monkeypatch, "fewshot", "--train", "n_way=2", "root=x") == ["--train", "--n_way=2", "--data.root=x"]
    assert parsed(monkeypatch, "check", "root=x") == ["--data.root=x"]
    assert parsed(monkeypatch, "export", "ckpt_path=a", "output=b") == ["--ckpt_path=a", "--output=b"]
    assert parsed(monkeypatch, "finetune", "--ckpt_path=a", "unfreeze=all") == ["--ckpt_path=a", "--unfreeze=all"]
    assert parsed(monkeypatch, "predict", "ckpt_path=a", "lr=3.png") == ["ckpt_path=a", "lr=3.png"]  # paths


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train lrr=0.01", "--lrr: no such option; did you mean --model.lr?"),
        ("train model.lrr=0.01", "--model.lrr: no such option; did you mean --model.lr?"),
        ("train --lr=0.01", "--lr: no such option; did you mean --model.lr?"),
        ("train --epochs=3", "--epochs: no such option; did you mean --trainer.max_epochs?"),
        ("predict --trainer.max_epochs=3", "--trainer.max_epochs: no such option; --help lists them"),
        ("train --data=photos", "--data=photos: is a group of options, such as --data.root, or a file of them"),
        (
            "train --trainer gpu",
            "--trainer=gpu: is a group of options, such as --trainer.accelerator, or a file of them",
        ),
        ("tune lr=0.01", "lr: matches 2 options; give one in full: --model.lr, --tune.lr"),
        ("runs lgs=x", "--lgs: no such option; did you mean --logs?"),
        ("train qqqqqqqqqq=1", "--qqqqqqqqqq: no such option; --help lists them"),
        ("train photos", "photos: no such option; --help lists them"),
    ],
)
def test_a_word_that_is_no_option_gets_the_nearest(words, said, refused):
    assert refused(*words.split()) == f"error: {said}"


def test_typed_both_ways_a_run_is_the_same(tmp_path):
    root = draw(tmp_path / "colours")
    common = ["image_size=32", "report=false"]
    main(["train", f"data.root={root}", *common, "max_epochs=2", "lr=0.01", "name=plain"])
    main(
        [
            "train",
            f"--data.root={root}",
            "--model.image_size=32",
            "--report=false",
            "--trainer.max_epochs=2",
            "--model.lr=0.01",
            "--name=dashed",
        ]
    )
    plain, dashed = (next(Path("logs").glob(f"{name}/*/config.yaml")).read_text() for name in ("plain", "dashed"))
    assert plain.replace("plain", "dashed") == dashed


@pytest.mark.fault("run name that is not a valid folder name")
@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "/tmp/x", "../x", "a\\b"])
def test_a_name_stays_below_the_logs(name, refused):
    for verb in ("train", "tune", "evaluate"):
        assert "is not a valid folder name; leave out / and .." in refused(verb, f"--name={name}")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "  --accelerator" in (HELP / f"{verb}.txt").read_text()])
def test_a_command_of_one_device_refuses_several(verb, refused):
    for option in ("--trainer.devices=2", "--devices=2", "--trainer.num_nodes=2"):
        assert "this command uses one device" in refused(verb, option)
