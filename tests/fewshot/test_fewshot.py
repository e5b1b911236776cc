"""Episodes, heads, meta-training: against formulas, loops and simulations."""

import json
import math
import shutil
import statistics
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from headstart.cli import main
from headstart.errors import UserError
from headstart.features.matrix import Labelled
from headstart.fewshot import glyphs
from headstart.fewshot.compare import AS_TRAIN, AsTrain, accuracies
from headstart.fewshot.data import EpisodeData
from headstart.fewshot.episodes import Episode, EpisodeLoader, EpisodeSampler, TaskSize
from headstart.fewshot.heads import (
    Anil,
    Logistic,
    Projection,
    Prototype,
    adaptation,
    fit_logistic,
    learnt,
    make_head,
    ridge_dual,
)
from headstart.fewshot.module import MetaLearner
from headstart.fewshot.save import fitted
from headstart.fewshot.sources import Classes, classes_of, split_classes
from headstart.fewshot.training import keep_share, make_trainer
from headstart.model.backbone import FrozenBackbone
from headstart.model.calibration import fit_temperature
from headstart.model.heads import Unit
from headstart.search.bank import HeadSettings, Schedule, train_bank
from headstart.search.intervals import mean_and_half_width
from support import REPOSITORY, killed_at, newest_run, rows_of

WIDTH = 16
SMALL = TaskSize(5, 2, 3)


def sampler(classes: int = 12, images: int = 20, size: TaskSize = SMALL, seed: int = 0) -> EpisodeSampler:
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(classes, 1, WIDTH, generator=generator)
    features = centres + 0.5 * torch.randn(classes, images, WIDTH, generator=generator)
    rows = torch.arange(classes * images).view(classes, images).tolist()
    return EpisodeSampler(features.flatten(0, 1), rows, size, "test", seed)


def task(batch: int = 3, n_way: int = 4, k_shot: int = 3, n_query: int = 2, dtype=torch.float64) -> Episode:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(batch, n_way, 1, WIDTH, generator=generator, dtype=dtype)
    noise = torch.randn(batch, n_way, k_shot + n_query, WIDTH, generator=generator, dtype=dtype)
    drawn = centres + noise
    return Episode(drawn[:, :, :k_shot], drawn[:, :, k_shot:])


HEADS = ("prototype", "ridge", "logistic", "anil", "projection")


# Episodes


def test_an_episode_is_a_function_of_seed_split_and_number():
    drawn = sampler()
    together, alone = drawn.rows(range(50)), torch.cat([drawn.rows([number]) for number in range(50)])
    assert torch.equal(together, alone)
    assert torch.equal(drawn.rows([49, 3]), together[[49, 3]])
    assert not torch.equal(sampler(seed=1).rows(range(50)), together)


def test_support_and_query_are_disjoint_and_of_the_same_class():
    rows = sampler().rows(range(500))
    assert rows.shape == (500, 5, 5)
    classes = rows // 20
    assert (classes == classes[:, :, :1]).all()
    assert all(len(set(episode)) == 5 for episode in classes[:, :, 0].tolist())
    assert all(len(set(images)) == 25 for images in rows.flatten(1).tolist())


def test_classes_slots_and_images_are_uniform():
    rows = sampler().rows(range(6000))
    classes = rows[:, :, 0] // 20
    for slot in range(5):
        counts = torch.bincount(classes[:, slot], minlength=12)
        assert (counts - 500).abs().max() < 110  # five standard deviations
    counts = torch.bincount((rows % 20).flatten(), minlength=20)
    assert (counts / counts.sum() - 1 / 20).abs().max() < 0.002


def test_too_few_classes_or_images_are_said():
    with pytest.raises(UserError, match="--n_way=5: the test split has 4 classes"):
        sampler(classes=4)
    with pytest.raises(UserError, match="a class has 4 images, and 5 are needed"):
        sampler(images=4)


def test_training_episodes_are_new_in_each_epoch_and_validation_is_fixed():
    epoch = 0
    loader = EpisodeLoader(sampler(), 10, 4, lambda: epoch * 10)
    first = [batch.support for batch in loader]
    epoch = 1
    second = [batch.support for batch in loader]
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))


# Heads


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_is_the_same_as_a_loop(name):
    head, episode = make_head(name, 4, WIDTH).double(), task()
    with torch.no_grad():
        together = head(*episode)
        alone = torch.cat([head(episode.support[i : i + 1], episode.query[i : i + 1]) for i in range(3)])
    assert together.shape == (3, 8, 4)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", ["prototype", "ridge", "logistic", "anil", "projection"])
def test_gradients_are_right(name):
    head, episode = make_head(name, 3, WIDTH).double(), task(batch=2, n_way=3, k_shot=2, n_query=1)
    support = episode.support.clone().requires_grad_()
    parameters = list(head.parameters())

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(inputs[0], episode.query).flatten(0, 1), episode.labels.repeat(2))

    if name == "logistic":  # through eigenvectors, of which only the span matters: on the parameters of none
        assert torch.isfinite(loss(support))
        return
    assert torch.autograd.gradcheck(loss, (support, *parameters), atol=1e-6)


def test_one_step_of_anil_has_the_gradient_of_the_formula():
    """(I - a H) grad L_query(theta'), with H = (1/n) sum (diag p - p p^T) (x) x x^T."""
    episode = task(batch=1, n_way=3, k_shot=4, n_query=5)
    rows, queries = episode.support[0].flatten(0, 1), episode.query[0].flatten(0, 1)
    labels, wanted = torch.arange(3).repeat_interleave(4), torch.arange(3).repeat_interleave(5)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    zero, rate = torch.zeros(3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def gradient(first_order: bool) -> torch.Tensor:
        weight = start.clone().requires_grad_()
        learnt, _ = adaptation(1, first_order)((weight, zero), rows, labels, rate)
        loss = functional.cross_entropy(queries @ learnt.T, wanted)
        return torch.autograd.grad(loss, weight)[0]

    shares = (rows @ start.T).softmax(dim=1)
    onehot = functional.one_hot(labels, 3).double()
    learnt = start - rate * (shares - onehot).T @ rows / len(rows)
    after = (queries @ learnt.T).softmax(dim=1) - functional.one_hot(wanted, 3).double()
    outer = after.T @ queries / len(queries)
    blocks = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None]
    hessian = torch.einsum("nij,nd,ne->idje", blocks, rows, rows).reshape(3 * WIDTH, 3 * WIDTH) / len(rows)
    exact = (outer.flatten() - rate * hessian @ outer.flatten()).view(3, WIDTH)
    # The bias learns too, and is zero before; its cross terms are left out by comparing without it.
    torch.testing.assert_close(gradient(first_order=False), exact, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient(first_order=True), outer, rtol=1e-6, atol=1e-8)
    assert (gradient(True) - exact).norm() > 1e-3


def test_one_step_from_zero_gives_centred_prototypes():
    episode = task(batch=1)
    rows, labels = episode.support[0].flatten(0, 1), torch.arange(4).repeat_interleave(3)
    zero = (torch.zeros(4, WIDTH, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    weight, bias = adaptation(1, False)(zero, rows, labels, torch.tensor(0.7, dtype=torch.float64))
    prototypes = episode.support[0].mean(dim=1)
    torch.testing.assert_close(weight, 0.7 / 4 * (prototypes - prototypes.mean(dim=0)))
    torch.testing.assert_close(bias, zero[1])


def test_zero_steps_are_the_plain_head():
    head, episode = Anil(4, WIDTH, inner_steps=0).double(), task()
    torch.nn.init.normal_(head.weight)
    mean = episode.support.mean(dim=(1, 2), keepdim=True)
    rows = functional.normalize(episode.query - mean, dim=-1).flatten(1, 2)
    torch.testing.assert_close(head(*episode), rows @ head.weight.T + head.bias)


def test_the_dual_of_ridge_is_its_primal():
    episode = task()
    rows, target = (
        episode.support.flatten(1, 2),
        torch.eye(4, dtype=torch.float64).repeat_interleave(3, 0).expand(3, -1, -1),
    )
    strength = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    primal = torch.linalg.solve(
        rows.mT @ rows + strength[:, None, None] * torch.eye(WIDTH, dtype=torch.float64), rows.mT @ target
    )
    torch.testing.assert_close(ridge_dual(rows, target, strength), primal.mT)


def test_logistic_is_the_exact_optimum():
    """That of scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    episode, labels = task(batch=2, k_shot=5), torch.arange(4).repeat_interleave(5)
    rows = functional.normalize(episode.support, dim=-1).flatten(1, 2)
    coefficients, bias = fit_logistic(rows, labels, 4, c=1.0)
    for number in range(2):
        exact = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(rows[number].numpy(), labels.numpy())
        queries = functional.normalize(episode.query[number].flatten(0, 1), dim=-1)
        found = (queries @ rows[number].T @ coefficients[number] + bias[number]).softmax(dim=1)
        torch.testing.assert_close(found, torch.from_numpy(exact.predict_proba(queries.numpy())), rtol=0, atol=1e-5)


def test_the_projection_starts_as_the_baseline():
    episode = task()
    found, baseline = Projection(WIDTH).double()(*episode), Prototype()(*episode)
    assert torch.equal(found.argmax(dim=-1), baseline.argmax(dim=-1))


def test_prototypes_by_hand_and_their_variants():
    episode = task(batch=1)
    prototypes = episode.support[0].mean(dim=1)
    expected = -torch.cdist(episode.query[0].flatten(0, 1), prototypes).square()
    torch.testing.assert_close(Prototype()(*episode)[0], expected)
    # Distances are the same wherever the origin is.
    torch.testing.assert_close(Prototype(centre=True)(*episode)[0], expected)
    likeness = functional.cosine_similarity(episode.query[0].flatten(0, 1)[:, None], prototypes, dim=-1)
    torch.testing.assert_close(Prototype("cosine").double()(*episode)[0], 10 * likeness)
    unit = Prototype(l2=True)
    torch.testing.assert_close(unit(*episode), unit(3 * episode.support, 5 * episode.query))


@pytest.mark.parametrize("name", ["prototype", "ridge", "logistic", "projection"])
@pytest.mark.parametrize("options", [{}, {"centre": True}, {"l2": True}, {"centre": True, "l2": True}, {"l2": False}])
def test_the_saved_head_says_what_the_head_says(name, options):
    metric = "cosine" if options.get("centre") else "euclidean"
    head, episode = make_head(name, 4, WIDTH, metric=metric, **options).double(), task(batch=1)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = learnt(head, list(episode.support[0])).double()
    assert isinstance(found, Unit) == (head.l2 or getattr(head, "metric", "") == "cosine")
    said = found(episode.query[0].flatten(0, 1)).softmax(dim=1)
    torch.testing.assert_close(said, head(*episode)[0].softmax(dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_tells_separate_classes_apart(name):
    assert accuracies(make_head(name, 5, WIDTH), sampler(size=TaskSize(5, 5, 5)), 100).mean() > 0.95


def test_the_linear_head_is_trained_as_train_does():
    episode, labels = task(batch=2, k_shot=10, dtype=torch.float32), torch.arange(4).repeat_interleave(10)
    with torch.no_grad():
        found = AsTrain()(*episode)
    for number in range(2):
        train = Labelled.of(episode.support[number].flatten(0, 1), labels)
        schedule = Schedule(epochs=25, batch_size=32, warmup=0.04, seed=0)
        (wanted,) = train_bank([HeadSettings(0.003, 0.01, 0.1)], train, train, 4, schedule, keep_last=True)
        logits = wanted.head(episode.query[number].flatten(0, 1))
        torch.testing.assert_close(found[number], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_the_strength_is_the_one_that_tells_pictures_left_out_best(name):
    few = list(task(batch=1, k_shot=4, dtype=torch.float32).support[0])
    found, losses = fitted(make_head(name, 4, WIDTH), few), {}
    for strength in make_head(name, 4, WIDTH).strengths:
        head = make_head(name, 4, WIDTH)
        head.set_strength(strength)
        alone = []
        for out in range(4):
            learner = learnt(head, [torch.cat([rows[:out], rows[out + 1 :]]) for rows in few])
            alone.append(learner(torch.stack([rows[out] for rows in few])))
        logits, labels = torch.cat(alone).detach(), torch.arange(4).repeat(4)
        temperature = fit_temperature(logits, labels)
        losses[float(functional.cross_entropy(logits / temperature, labels))] = (temperature, learnt(head, few))
    assert len(losses) > 5
    temperature, wanted = losses[min(losses)]
    assert found.temperature == pytest.approx(temperature)
    rows = torch.cat(few)
    torch.testing.assert_close(found.head(rows), wanted(rows).detach())


def test_a_share_is_kept_by_validation():
    """The map that was learnt here is noise, of which nothing helps; then it is the identity of the useful half."""
    drawn, width = sampler(), WIDTH
    for weight, kept in ((torch.randn(width, width, generator=torch.Generator().manual_seed(0)) * 9, 0.0), (None, 1.0)):
        head = Projection(width)
        untrained = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        if weight is None:  # untrained, it confuses all; the trained one is right
            untrained["map.weight"] = torch.zeros(width, width)
        else:
            head.map.weight.data = weight
        trained = head.map.weight.detach().clone()
        keep_share(head, untrained, (0.0, 1.0), drawn, 100)
        torch.testing.assert_close(head.map.weight.detach(), untrained["map.weight"].lerp(trained, kept))


# Intervals


def test_the_interval_covers_the_mean_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(2000):
        mean, half_width = mean_and_half_width(torch.rand(30, generator=generator))
        covered += abs(mean - 0.5) <= half_width
    assert 0.93 <= covered / 2000 <= 0.97


def test_the_interval_is_students():
    values = [0.5, 0.6, 0.55, 0.65, 0.58]
    mean, half_width = mean_and_half_width(values)
    assert mean == pytest.approx(statistics.mean(values), rel=1e-14)  # in float64 throughout
    assert mean == pytest.approx(statistics.mean(values))
    assert half_width == pytest.approx(2.7764 * statistics.stdev(values) / math.sqrt(5), rel=1e-4)
    assert mean_and_half_width([0.5, 0.7])[1] == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert mean_and_half_width(torch.tensor([0.5])) == (0.5, math.inf)


# The module


class Tasks:
    """A data module's loaders, of episodes that are drawn from made features."""

    def __init__(self) -> None:
        self.loader = EpisodeLoader(sampler(size=TaskSize(5, 2, 3)), 20, 5)


def test_adaptation_is_alive_inside_the_trainers_test():
    module = MetaLearner(5, WIDTH, "anil")
    result = make_trainer("cpu").test(module, Tasks().loader, verbose=False)[0]
    assert result["test/acc"] > 0.9  # a head that does not adapt says 0.2
    assert result["test/acc_ci95"] < 0.1
    assert not module.head.weight.any()  # the start itself did not move
    module = MetaLearner(5, WIDTH, "anil", inner_steps=0)
    result = make_trainer("cpu").test(module, Tasks().loader, verbose=False)[0]
    assert result["test/acc"] == pytest.approx(0.2)


# Sources


def test_groups_stay_together_and_splits_are_disjoint():
    names = [f"group{number // 9}/class{number}" for number in range(90)]
    classes = Classes(Path(), names, [name.split("/")[0] for name in names], {})
    parts = split_classes(classes, 0.2, 0.3, seed=0)
    assert {split: len(found) for split, found in parts.items()} == {"train": 45, "val": 18, "test": 27}
    groups = {split: {name.split("/")[0] for name in found} for split, found in parts.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["val"]
    assert split_classes(classes, 0.2, 0.3, seed=1) != parts
    assert len(split_classes(classes, 0.0, 1.0, seed=0)["test"]) == 90


def test_folders_of_splits_are_used_and_without_val_train_is_split(tmp_path):
    for split, count in (("train", 10), ("test", 3)):
        for number in range(count):
            (tmp_path / split / f"{split}{number}").mkdir(parents=True)
    parts = split_classes(classes_of("folder", str(tmp_path), tmp_path / "cache"), 0.2, 0.3, seed=0)
    assert {split: len(names) for split, names in parts.items()} == {"train": 8, "val": 2, "test": 3}
    assert parts["test"] == [f"test/test{number}" for number in range(3)]
    (tmp_path / "val" / "val0").mkdir(parents=True)
    parts = split_classes(classes_of("folder", str(tmp_path), tmp_path / "cache"), 0.2, 0.3, seed=0)
    assert {split: len(names) for split, names in parts.items()} == {"train": 10, "val": 1, "test": 3}


def test_omniglot_zips_are_read_and_repeated_characters_are_there_once(tmp_path):
    image = tmp_path / "a.png"
    Image.new("1", (105, 105)).save(image)
    for archive, alphabets in (("one.zip", ["Greek", "Latin"]), ("two.zip", ["Greek", "Tifinagh"])):
        with zipfile.ZipFile(tmp_path / archive, "w") as file:
            for alphabet in alphabets:
                for character in range(3):
                    file.write(image, f"images_background_small/{alphabet}/character{character:02}/0001_01.png")
    found = classes_of("omniglot", f"{tmp_path / 'one.zip'},{tmp_path / 'two.zip'}", tmp_path / "cache")
    assert len(found.class_names) == 9
    assert set(found.groups) == {"Greek", "Latin", "Tifinagh"}
    again = classes_of("omniglot", str(found.root), tmp_path / "cache")
    assert again.class_names == found.class_names
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(UserError, match="not a zip file"):
        classes_of("omniglot", str(tmp_path / "bad.zip"), tmp_path / "cache")
    with pytest.raises(UserError, match="no such file"):
        classes_of("omniglot", "nowhere.zip", tmp_path / "cache")
    with pytest.raises(UserError, match=r"--data\.root is missing"):
        classes_of("omniglot", None, tmp_path / "cache")


def test_glyphs_are_many_and_differ():
    classes = glyphs._classes(glyphs._typefaces())
    assert 300 <= len(classes) <= 600
    assert len({script for script, _ in classes}) >= 7
    characters = {character for _, character in classes}
    assert len(characters & {"A", "Α", "А"}) == 1  # Latin, Greek and Cyrillic
    assert "é" not in characters


def test_glyphs_are_drawn_the_same_each_time(monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, "EXAMPLES", 2)
    monkeypatch.setattr(glyphs, "_classes", lambda typefaces: [("latin", "g"), ("greek", "Ω")])
    first, second = glyphs.glyphs(tmp_path / "one"), glyphs.glyphs(tmp_path / "two")
    paths = sorted(path.relative_to(first) for path in first.rglob("*.png"))
    drawn = [f"{character}/{number}.png" for character in ("greek/U+03A9", "latin/U+0067") for number in ("00", "01")]
    assert [path.as_posix() for path in paths] == drawn
    for path in paths:
        assert (first / path).read_bytes() == (second / path).read_bytes()
        assert np.asarray(Image.open(first / path)).min() < 100
    assert glyphs.glyphs(tmp_path / "one") == first
    assert not list(first.parent.glob(".*"))


# The verb


@pytest.fixture
def shapes(tmp_path) -> Path:
    """16 classes of 16 images: two stripes in colours of the class, much noise."""
    random = np.random.default_rng(0)
    for label in range(16):
        folder = tmp_path / "shapes" / f"class{label:02}"
        folder.mkdir(parents=True)
        colours = random.integers(0, 256, (2, 3))
        for number in range(16):
            pixels = np.tile(np.repeat(colours, 8, axis=0), (2, 1))[:, None].repeat(32, axis=1)
            pixels = pixels + random.integers(-220, 220, pixels.shape)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return tmp_path / "shapes"


@pytest.fixture
def fewshot(shapes):
    def run(*options: str) -> dict:
        small = ["--model.image_size=32", "--n_way=3", "--n_query=5", "--episodes=60", "--data.source=folder"]
        sizes = ["--data.val_episodes=20", "--data.train_episodes=40"]
        return main(["fewshot", f"--data.root={shapes}", *small, *sizes, *options])

    return run


def test_a_run_reports_accuracy_interval_and_baseline(fewshot):
    result = fewshot("--head=ridge", "--k_shot=2")
    assert result["test/acc"] > 0.6
    assert 0 < result["test/acc_ci95"] < 0.1
    assert result["gain/acc"] == pytest.approx(result["test/acc"] - result["baseline/acc"], abs=1e-6)
    assert json.loads((newest_run() / "result.json").read_text()) == result
    assert fewshot("--head=ridge", "--k_shot=2")["test/acc"] == result["test/acc"]


def test_meta_training_is_an_ordinary_run(fewshot):
    result = fewshot("--head=projection", "--train", "--max_epochs=3")
    run = newest_run()
    assert (run / "checkpoints/last.ckpt").stat().st_size < 4_000_000
    assert {"config.yaml", "splits.csv", "result.json"} <= {path.name for path in run.iterdir()}
    rows = rows_of(run / "splits.csv")
    classes = {split: {row["class"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert not classes["train"] & classes["test"]
    assert not classes["train"] & classes["val"]
    assert all(classes.values())
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"train/loss", "val/acc", "val/acc_ci95", "test/acc", "test/acc_ci95"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("val/acc")) == 3
    assert result["test/acc"] == pytest.approx(events.Scalars("test/acc")[-1].value)


@pytest.mark.parametrize("head", ["projection", "anil"])
def test_an_interrupted_meta_training_ends_with_the_same_bits(fewshot, head):
    options = (f"--head={head}", "--train", "--max_epochs=4", "--patience=9")
    fewshot(*options, "--name=whole")
    whole = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)

    with killed_at(2, MetaLearner):
        fewshot(*options, "--name=parts")
    run = newest_run()
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    fewshot(*options, "--name=parts", "--ckpt_path=last")
    assert newest_run() == run
    parts = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert parts["epoch"] == whole["epoch"] == 3
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name]), name
    for key, state in whole["optimizer_states"][0]["state"].items():
        other = parts["optimizer_states"][0]["state"][key]
        assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(other[name])) for name in state)


@pytest.mark.fault("images added, deleted or changed before a run is resumed")
def test_a_resumed_meta_training_keeps_its_images(fewshot, shapes, capsys, refused):
    with killed_at(1, MetaLearner):
        fewshot("--head=projection", "--train", "--max_epochs=2")
    run = newest_run()
    added = shapes / "class00/added.png"
    Image.new("RGB", (32, 32), "red").save(added)
    row = next(row for row in rows_of(run / "splits.csv") if row["split"] == "test")
    kept = (shapes / row["path"]).read_bytes()
    (shapes / row["path"]).unlink()
    options = ("--data.source=folder", f"--data.root={shapes}", "--model.image_size=32", "--ckpt_path=last")
    assert f"{row['path']}: is missing" in refused("fewshot", "--head=projection", "--train", *options)
    (shapes / row["path"]).write_bytes(kept)
    capsys.readouterr()
    fewshot("--head=projection", "--train", "--max_epochs=2", "--ckpt_path=last")
    assert "1 image(s) are not in" in capsys.readouterr().out
    assert newest_run() == run


@pytest.mark.fault("copies of an image in a few-shot class")
def test_a_content_has_one_row_per_class(fewshot, shapes, capsys):
    for number in range(3):
        (shapes / f"class00/copy{number}.png").write_bytes((shapes / "class00/00.png").read_bytes())
    result = fewshot("--name=copies")
    assert sum(result["images"].values()) == 16 * 16
    assert capsys.readouterr().out.count("3 image(s) are copies of others in their class") == 1


def test_a_root_means_a_folder(shapes):
    small = ["--model.image_size=32", "--n_way=2", "--n_query=2", "--episodes=5"]
    assert main(["fewshot", f"--data.root={shapes}", *small])["images"]["train"] > 0
    assert newest_run().parent.name == "fewshot-folder-prototype"
    assert main(["fewshot", f"--data.root={shapes}", f"--test_root={shapes}", *small])["images"]["test"] == 256


def test_all_heads_are_compared_on_the_same_episodes(fewshot):
    fewshot("--head=all", "--train", "--max_epochs=1")
    run = max(Path("logs").glob("fewshot-folder-all/*"))
    rows = rows_of(run / "heads.csv")
    names = {row["head"] for row in rows}
    assert names == {*HEADS, AS_TRAIN, "ridge (trained)", "anil (trained)", "projection (trained)"}
    assert {row["k_shot"] for row in rows} == {"1", "5"}  # of 16 images, 10 shots and 10 queries are too many
    baseline = {row["k_shot"]: float(row["acc"]) for row in rows if row["head"] == "prototype"}
    for row in rows:
        assert float(row["gain"]) == pytest.approx(float(row["acc"]) - baseline[row["k_shot"]], abs=1e-6)
    with Image.open(run / "heads.png") as image:
        assert np.asarray(image).std() > 10
    events = EventAccumulator(str(run))
    events.Reload()
    shown = {(point.step, round(point.value, 4)) for point in events.Scalars("accuracy_by_shots/ridge")}
    assert shown == {(int(row["k_shot"]), round(float(row["acc"]), 4)) for row in rows if row["head"] == "ridge"}


def test_training_on_one_source_and_testing_on_another(fewshot, shapes, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for label in range(4):
        (shapes / f"class{label:02}").rename(other / f"new{label}")
    result = fewshot(
        "--head=projection", "--train", "--max_epochs=1", "--test_source=folder", f"--test_root={other}", "--n_way=2"
    )
    assert result["classes"] == 4
    assert result["images"] == {"train": 0, "val": 0, "test": 64}


def test_few_pictures_become_a_checkpoint_that_every_verb_takes(fewshot, shapes, refused):
    few = shapes.parent / "few"
    for folder in sorted(shapes.iterdir())[:4]:
        (few / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:5]:
            path.rename(few / folder.name / path.name)
    for head in ("prototype", "ridge"):
        made = main(["fewshot", f"--head={head}", f"--data.root={few}", f"--save={head}.ckpt", "--model.image_size=32"])
        assert made["left_out/acc"] > 0.7
        assert made["images"] == 20
    # wing: deploy
    rest = sorted(str(path) for folder in sorted(shapes.iterdir())[:4] for path in folder.iterdir())
    main(["predict", "--ckpt_path=ridge.ckpt", *rest, "--output=rows.csv"])
    rows = rows_of(Path("rows.csv"))
    assert np.mean([Path(row["path"]).parent.name == row["label"] for row in rows]) > 0.7
    # /wing
    result = main(["evaluate", "--ckpt_path=prototype.ckpt", f"--data.root={few}", "--report=false"])
    assert result["test/acc"] > 0.7
    assert next(iter(result)) == "test/loss_scaled"  # the loss of the calibrated probabilities leads
    main(["export", "--ckpt_path=prototype.ckpt", f"--data.root={few}", "--output=few.pth"])  # wing: deploy
    line = refused("fewshot", f"--data.root={few}", "--save=ridge.ckpt", "--model.image_size=32")
    assert "already exists" in line
    assert "--save: anil cannot be saved" in refused("fewshot", f"--data.root={few}", "--save=a.ckpt", "--head=anil")


def test_a_meta_trained_projection_predicts_as_in_its_episode(fewshot, shapes, refused, monkeypatch):
    few, rest, heads = shapes.parent / "few", shapes.parent / "rest", []
    options = ("--head=projection", "--train", "--max_epochs=2", "--save=few.ckpt", f"--save_root={few}")
    for name in ("class00", "class01"):
        shutil.copytree(shapes / name, few / name)
    line = ["--data.source=folder", f"--data.root={shapes}", "--model.image_size=32", *options]
    assert "classes also in --data.root: class00, class01" in refused("fewshot", *line)
    (few / "class00").rename(few / "other")
    assert "classes also in --data.root: class01, other" in refused("fewshot", *line)  # by its images
    shutil.rmtree(few)
    for folder in sorted(shapes.iterdir())[:3]:
        shutil.copytree(folder, rest / folder.name)
        shutil.rmtree(folder)
        (few / folder.name).mkdir(parents=True)
        for path in sorted((rest / folder.name).iterdir())[:4]:
            path.rename(few / folder.name / path.name)

    def noted(head, *rows, **how):
        heads.append(head)
        return fitted(head, *rows, **how)

    monkeypatch.setattr("headstart.verbs.fewshot.fitted", noted)
    result = fewshot(*options)
    assert result["left_out/acc"] > 0.5
    (head,) = heads
    assert (head.map.weight - torch.eye(len(head.map.weight))).abs().max() > 1e-3  # it was meta-trained
    # wing: deploy
    main(["predict", "--ckpt_path=few.ckpt", str(rest), "--output=rows.csv"])
    said = {Path(row["path"]).name + Path(row["path"]).parent.name: row["label"] for row in rows_of(Path("rows.csv"))}
    data = {}
    for place in (few, rest):
        data[place] = EpisodeData("folder", str(place), test_fraction=1.0)
        data[place].load(FrozenBackbone(image_size=32), torch.device("cpu"))
    support, query = (torch.stack(data[place].all_support())[None] for place in (few, rest))
    with torch.no_grad():
        wanted = head(support, query)[0].argmax(dim=1).tolist()
    names = [Path(item.path).name + Path(item.path).parent.name for item in data[rest].items]
    assert [said[name] for name in names] == [data[few].class_names[label] for label in wanted]
    # /wing


def test_one_picture_per_class_leaves_none_out(shapes, capsys, refused):
    few = shapes.parent / "few"
    for number in range(3):
        (few / f"class{number:02}").mkdir(parents=True)
        (shapes / f"class{number:02}/00.png").rename(few / f"class{number:02}/00.png")
    made = main(["fewshot", "--head=logistic", f"--data.root={few}", "--save=one.ckpt", "--model.image_size=32"])
    assert made["left_out/acc"] is None
    assert "one per class, so none is left out" in capsys.readouterr().out
    assert torch.load("one.ckpt", weights_only=True)["headstart"]["temperature"] == 1
    # wing: deploy
    line = refused("export", "--ckpt_path=one.ckpt", f"--data.root={few}", "--output=one.pth")
    assert "needs --model.head=linear, but the checkpoint has a Unit" in line
    # /wing


def test_a_domain_is_the_test(shapes, refused):
    world = shapes.parent / "world"
    for number, folder in enumerate(sorted(shapes.iterdir())[:12]):
        (world / "abc"[number % 3]).mkdir(parents=True, exist_ok=True)
        folder.rename(world / "abc"[number % 3] / folder.name)
    options = ["fewshot", "--data.source=domains", f"--data.root={world}", "--model.image_size=32", "--n_way=3"]
    options += ["--head=projection", "--train", "--max_epochs=1", "--n_query=5", "--episodes=30"]
    assert "--data.test_domain=d: no such domain; choose from a, b, c" in refused(*options, "--data.test_domain=d")
    result = main([*options, "--data.test_domain=b", "--data.val_episodes=20", "--data.train_episodes=40"])
    assert result["images"] == {"train": 64, "val": 64, "test": 64}
    rows = rows_of(newest_run() / "splits.csv")
    assert {row["path"].split("/")[0] for row in rows if row["split"] == "test"} == {"b"}


def test_the_recipe_runs(fewshot):
    result = fewshot(f"--config={REPOSITORY / 'configs/fewshot.yaml'}", "--max_epochs=1", "--n_way=2")
    assert result["head"] == "projection"
    assert result["k_shot"] == 5


def test_mistakes_end_in_one_line(shapes, refused):
    folder = ("fewshot", "--data.source=folder", f"--data.root={shapes}", "--model.image_size=32")
    assert "lower --n_way" in refused(*folder, "--n_way=9")
    assert "has nothing to meta-train" in refused(*folder, "--train", "--n_way=2", "--n_query=2")
    assert "--head" in refused(*folder, "--head=magic")
    assert "--data.root is missing" in refused("fewshot", "--data.source=folder")
    assert "no unfinished run" in refused(*folder, "--ckpt_path=last")
    assert "--data.test_fraction" in refused(*folder, "--data.test_fraction=-0.1")


def test_a_class_in_two_splits_is_refused(tmp_path, shapes, refused):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (tmp_path / "split" / split / name).mkdir(parents=True)
    assert "classes in more than one split" in refused(
        "fewshot", "--data.source=folder", f"--data.root={tmp_path / 'split'}"
    )


def test_logistic_has_nothing_to_train():
    assert not MetaLearner(5, WIDTH, "logistic").learns
    assert MetaLearner(5, WIDTH, "ridge").learns
    assert isinstance(MetaLearner(5, WIDTH, "logistic").head, Logistic)


def test_a_checkpoint_that_is_no_such_heads_is_refused(fewshot, refused, shapes):
    fewshot("--train", "--head=projection", "--max_epochs=1", "--name=run")
    last = next(Path("logs/run").glob("*/checkpoints/last.ckpt"))
    options = ["fewshot", f"--data.root={shapes}", "--data.source=folder", "--model.image_size=32", "--n_query=5"]
    options += ["--train", "--data.val_episodes=20", "--data.train_episodes=40"]
    same = [*options, "--head=projection", "--n_way=3"]
    assert "is not a file" in refused(*same, "--ckpt_path=nowhere.ckpt")
    Path("torn.ckpt").write_bytes(last.read_bytes()[:500])
    assert "corrupt or not a checkpoint" in refused(*same, "--ckpt_path=torn.ckpt")
    assert "'head': 'projection'" in refused(*options, "--head=anil", "--n_way=3", f"--ckpt_path={last}")
    assert main([*same, "--max_epochs=2", f"--ckpt_path={last}"])["test/acc"] > 0.3
