"""The command `train`, from a folder to a result."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headstart import TransferClassifier
from support import COLOURS, REPOSITORY, RESNET18, draw, killed_at, newest_run


def test_a_separable_problem_is_learnt(colours, train):
    result = train(colours)
    assert result["test/acc"] == 1.0
    assert result["val/acc"] == 1.0
    assert result["test/auroc"] == 1.0
    assert sum(result["images"].values()) == 60


def test_without_a_cache_too(colours, train, own_cache):
    result = train(colours, "--data.cache=false", "--trainer.max_epochs=4", "--data.augment=light", "--model.lr=0.02")
    assert result["test/acc"] == 1.0
    assert not own_cache.exists()


def test_cached_and_uncached_training_end_at_the_same_head(colours, train):
    heads = []
    for cache in ("true", "false"):
        train(colours, f"--data.cache={cache}", "--data.feature_precision=fp32", "--trainer.max_epochs=3")
        heads.append(torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(*heads, rtol=0, atol=1e-5)


def test_the_run_folder_holds_all_that_was_promised(colours, train):
    result = train(colours, "--trainer.max_epochs=3")
    run = newest_run()
    assert run.parent == Path("logs/colours").resolve() or run.parent == Path("logs/colours")
    assert json.loads((run / "result.json").read_text()) == result
    assert set(result["seconds"]) == {"scan", "features", "fit", "test", "report", "total"}
    assert {"torch", "pytorch-lightning", "headstart"} <= set(result["versions"])
    rows = (run / "splits.csv").read_text().splitlines()
    assert len(rows) == 61
    assert {row.split(",")[0] for row in rows[1:]} == {"train", "val", "test"}
    assert (run / "checkpoints/best.ckpt").stat().st_size < 1_300_000
    assert (run / "checkpoints/last.ckpt").stat().st_size < 100_000
    assert not (run / "report.html").exists()


def test_the_events_hold_the_right_values(colours, train):
    result = train(colours, "--trainer.max_epochs=3", "--report=true")
    events = EventAccumulator(str(newest_run()), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "val/acc", "val/auroc", "val/balanced_acc", "val/f1", "val/calibration_error"} <= scalars
    assert not [name for name in scalars if name.startswith("hp")]
    assert {"test/acc", "lr-AdamW", "train/grad_norm", "val/temperature"} <= scalars
    assert len(events.Scalars("val/acc")) == 3
    assert events.Scalars("test/acc")[-1].value == pytest.approx(result["test/acc"])
    assert len(events.Images("test/confusion_matrix")) == 1
    text = events.Tensors("test/confusion_counts/text_summary")[0].tensor_proto.string_val[0].decode()
    counts = [[int(cell) for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]]
    assert sum(map(sum, counts)) == result["images"]["test"]
    assert sum(counts[i][i] for i in range(3)) == round(result["test/acc"] * result["images"]["test"])
    assert "run/text_summary" in events.Tags()["tensors"]
    plugins = events.summary_metadata["_hparams_/experiment"].plugin_data
    assert plugins.plugin_name == "hparams"
    assert all(name.encode() in plugins.content for name in ("model.lr", "test/acc", "val/acc"))
    assert events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"


def test_the_saved_configuration_repeats_the_run(tmp_path, train):
    mixed = draw(tmp_path / "mixed", images=14)
    draw(mixed, images=14, seed=1, colours={"red": COLOURS["green"]})  # so that it is not learnt to the end
    first = train(mixed, "--trainer.max_epochs=3", "--model.lr=0.002", "--seed_everything=7", "--data.split_seed=3")
    from headstart.cli import main

    second = main(["train", f"--config={newest_run() / 'config.yaml'}"])
    scores = [{name: value for name, value in result.items() if "/" in name} for result in (first, second)]
    assert scores[0] == scores[1]


@pytest.mark.fault("two runs in one log folder")
def test_two_runs_never_share_a_folder(colours, train):
    for _ in range(2):
        train(colours, "--trainer.max_epochs=1")
    assert len(list(Path("logs/colours").iterdir())) == 2


def test_later_configs_win_over_earlier_ones(colours, train, tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_epochs: 1}\nmodel: {lr: 0.5}\n")
    (tmp_path / "b.yaml").write_text("model: {lr: 0.25}\n")
    train(colours, "--config=a.yaml", "--config=b.yaml")
    saved = yaml.safe_load((newest_run() / "config.yaml").read_text())
    assert (saved["model"]["lr"], saved["trainer"]["max_epochs"]) == (0.25, 1)
    assert saved["data"]["root"] == str(colours)


@pytest.mark.parametrize("config", ["gpu.yaml", "imagenet.yaml", "smoke.yaml"])
def test_every_recipe_runs(config, colours, train, stand_in_for_imagenet):
    gpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"] if config == "gpu.yaml" else []
    result = train(
        colours,
        "--model.backbone=resnet18",
        "--model.weights=auto",
        f"--config={REPOSITORY / 'configs' / config}",
        *gpu,
        "--trainer.max_epochs=2",
    )
    assert 0 <= result["test/acc"] <= 1


def test_a_dry_run_leaves_nothing(colours, train):
    train(colours, "--trainer.fast_dev_run=true")
    assert not Path("logs").exists()


@pytest.mark.fault(
    "root that is missing",
    "value of the wrong type, unknown option",
    "value out of range",
    "image size out of range",
    "configuration file that is missing",
    "missing checkpoint, or a folder in its place",
    "no GPU, but one is requested",
    "16-mixed on a CPU",
)
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.lr=abc", "--model.lr: 'abc': is not a number"),
        ("--model.lr=-1", "must be a number >0"),
        ("--model.lr=inf", "must be a number >0 and <=1000"),
        ("--model.lrr=1", "did you mean --model.lr?"),
        ("--trainer.max_epoch=3", "did you mean --trainer.max_epochs?"),
        ("--data.root=nowhere", "nowhere: no such folder; the nearest that exists is"),
        ("--data.batch_size=0", "--data.batch_size: 0: must be a number >0"),
        ("--model.image_size=0", "must be a number >=32 and <=2048"),
        ("--config=missing.yaml", "missing.yaml"),
        ("--model.backbone=resnet19", "no such backbone; the nearest names are resnet18"),
        ("--model.backbone=squeezenet1_0", "no linear classifier"),
        ("--model.backbone=resnet50", "bundled"),
        ("--model.weights=missing.pth", "missing.pth"),
        ("--data.augment=light", "--data.views=8, or augment in every epoch with --data.cache=false"),
        ("--data.views=8", "--data.augment=light"),
        ("--trainer.accumulate_grad_batches=0", "--trainer.accumulate_grad_batches=0: give 1 or more"),
        ("--data.batch_size=99999999999999999999", "must be a number >0 and <2147483648"),
        ("--data.val_fraction=0.6 --data.test_fraction=0.5", "leave no images to train on"),
        ("--ckpt_path=missing.ckpt", "missing.ckpt: is not a file"),
        ("--ckpt_path=last", "no unfinished run"),
        ("--trainer.accelerator=gpu", "--trainer.accelerator=auto"),
        ("--trainer.precision=16-mixed", "bf16-mixed"),
        ("stray", "stray"),
    ],
)
def test_a_mistake_is_one_line(option, said, colours, refused):
    if "accelerator=gpu" in option and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in refused("train", f"--data.root={colours}", *option.split())
    assert not Path("logs").exists()


def test_an_unknown_verb(refused):
    assert "trein" in refused("trein")


def test_help_is_short(capsys):
    from headstart.cli import main

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 53
    assert "--data.batch_size" in text
    assert "--help_all" in text
    with pytest.raises(SystemExit):
        main(["train", "--help_all"])
    assert "--trainer.gradient_clip_val" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = "import sys; from headstart.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "train" in shown


@pytest.mark.parametrize("cached", ["true", "false"])
def test_an_interrupted_run_goes_on_to_the_same_end(cached, colours, train):
    options = [f"--data.cache={cached}", "--data.num_workers=1", "--trainer.max_epochs=4", "--name=run"]
    if cached == "false":
        options.append("--data.augment=light")
    train(colours, *options, "--logs=whole")

    with killed_at(2, TransferClassifier):
        train(colours, *options, "--logs=parts")
    assert not list(Path("parts/run").glob("*/result.json"))
    train(colours, *options, "--logs=parts", "--ckpt_path=last")
    assert len(list(Path("parts/run").iterdir())) == 1
    whole, parts = (
        torch.load(newest_run(Path(logs)) / "checkpoints/last.ckpt", weights_only=True) for logs in ("whole", "parts")
    )
    assert whole["epoch"] == parts["epoch"] == 3
    torch.testing.assert_close(whole["state_dict"], parts["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(whole["optimizer_states"], parts["optimizer_states"], rtol=0, atol=0)


def test_a_checkpoint_predicts_and_trains_on(colours, train):
    train(colours, *RESNET18, "--trainer.max_epochs=5")
    checkpoint = newest_run() / "checkpoints/best.ckpt"
    from PIL import Image

    model = TransferClassifier.load_from_checkpoint(checkpoint)
    images = [Image.open(colours / name / "000.png") for name in model.class_names]
    assert model.predict(images).argmax(1).tolist() == [0, 1, 2]
    assert model.predict(images[0]).sum().item() == pytest.approx(1, abs=1e-5)
    train(colours, *RESNET18, f"--ckpt_path={newest_run() / 'checkpoints/last.ckpt'}", "--trainer.max_epochs=7")
    assert len(list(Path("logs/colours").iterdir())) == 2
    assert torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 6


def test_runs_take_seconds_of_their_parts(colours, train):
    started = time.perf_counter()
    seconds = train(colours, "--trainer.max_epochs=1")["seconds"]
    assert seconds["total"] <= time.perf_counter() - started
    assert sum(seconds[part] for part in ("scan", "features", "fit", "test")) <= seconds["total"] + 0.01


def test_a_configuration_from_before_logs_had_that_name_still_runs(colours, train):
    first = train(colours, "--trainer.max_epochs=2")
    config = yaml.safe_load((newest_run() / "config.yaml").read_text())
    del config["logs"], config["model"]["head"], config["data"]["source"], config["data"]["order_seed"]
    config["trainer"]["default_root_dir"] = str(Path("elsewhere").resolve())
    Path("old.yaml").write_text(yaml.safe_dump(config))
    from headstart.cli import main

    assert main(["train", "--config=old.yaml"])["val/loss"] == first["val/loss"]
    assert newest_run(Path("elsewhere")).parent.name == "colours"
    main(["train", f"--config={newest_run() / 'config.yaml'}", "--trainer.default_root_dir=third"])
    assert newest_run(Path("third")).parent.name == "colours"


def test_a_seed_of_true_is_drawn_and_kept(colours, train, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr("secrets.randbelow", lambda limit: 1234)
    train(colours, "--trainer.max_epochs=1", "--seed_everything=true")
    assert "seed_everything: 1234\n" in (newest_run() / "config.yaml").read_text()
