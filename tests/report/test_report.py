"""Figures, TensorBoard and the report: right values, read back; the report in a real browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headstart.cli import main
from headstart.data.splits import Item
from headstart.features.matrix import Labelled
from headstart.model.calibration import Logits, fit_temperature
from headstart.report.drawing import ticks
from headstart.report.evaluation import Evaluation, evenly_spaced
from headstart.report.figures import confusion_figure, evaluation_figures, training_figures
from headstart.report.leaks import leaks_of
from headstart.report.learning_curve import PENALTIES, LearningCurve, ridge, stratified
from headstart.report.page import common_folder
from headstart.report.verdict import verdict_of
from headstart.search.intervals import wilson
from support import COLOURS, draw, newest_run, working_in

FIGURES = {"coverage", "roc", "precision_recall", "reliability"}
TILED = ("confusion_matrix", "worst_mistakes", "surest_right")
BROWSER = shutil.which("chromium")


def evaluation_of(classes: int, images: int = 400, temperature: float = 1.0) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) + 2 * torch.nn.functional.one_hot(labels, classes)
    return Evaluation(
        split="test",
        class_names=[f"class ${number} <b>" for number in range(classes)],
        items=[Item(f"{label}/{number}.png", label) for number, label in enumerate(labels.tolist())],
        labels=labels,
        logits=logits,
        temperature=temperature,
        projected=evenly_spaced(images, 50),
        features=torch.randn(50, 8),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a report, of classes of which two look alike, so that there are mistakes; all tests only read it."""
    folder = tmp_path_factory.mktemp("reported")
    draw(folder / "mixed <i>", images=24)
    draw(folder / "mixed <i>", images=8, seed=1, colours={"red": COLOURS["green"]})
    (folder / "mixed <i>/blue").rename(folder / "mixed <i>/blue & <b>bold")
    with working_in(folder):
        main(["train", "--data.root=mixed <i>", "--model.image_size=32", "--trainer.max_epochs=3"])
        return newest_run().resolve()


@pytest.fixture
def mixed(run) -> Path:
    return run.parents[2] / "mixed <i>"


def test_a_temperature_that_was_put_in_is_found():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial((logits / 1.7).softmax(dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(1.7, rel=0.03)
    metric = Logits()
    for rows in torch.split(torch.arange(len(labels)), 512):
        metric.update(logits[rows], labels[rows])
    assert all(map(torch.equal, metric.compute(), (logits, labels)))


def test_a_few_images_that_are_all_right_make_no_certainty():
    logits = torch.eye(3).repeat(4, 1) * 5
    temperature = fit_temperature(logits, torch.arange(3).repeat(4))
    assert 0.9 < float((logits / temperature).softmax(dim=1).amax(dim=1).mean()) < 0.99


def test_an_evaluation_counts_right():
    evaluation = evaluation_of(4)
    assert int(evaluation.confusion.sum()) == 400
    assert evaluation.acc == pytest.approx(float(evaluation.confusion.diag().sum()) / 400)
    scores = evaluation.by_class()
    assert scores["images"].tolist() == torch.bincount(evaluation.labels, minlength=4).tolist()
    assert float(scores["recall"][1]) == float(evaluation.right[evaluation.labels == 1].float().mean())
    worst = evaluation.surest(right=False, count=10)
    assert not evaluation.right[worst].any()
    assert (
        evaluation.confidence[worst].tolist()
        == sorted(evaluation.confidence[~evaluation.right].tolist(), reverse=True)[:10]
    )


@pytest.mark.parametrize("classes", [2, 12, 200])
def test_figures_at_any_number_of_classes(classes):
    evaluation = evaluation_of(classes)
    figures = evaluation_figures(evaluation)
    assert set(figures) == FIGURES
    for figure in [*figures.values(), confusion_figure(evaluation)]:
        pixels = figure.pixels()
        assert pixels.shape == (figure.height, figure.width, 3)
        assert max(pixels.shape) <= 1800
        assert 0.001 < (pixels.min(axis=2) < 128).mean() < 0.6
    drawn = "".join(figure.svg("about <b>") for figure in figures.values())
    assert len(drawn) < 500_000
    assert "<b>" not in drawn
    assert "&lt;b&gt;, area" in drawn


def test_charts_of_a_training_have_round_ticks():
    (loss,) = training_figures({"train/loss": [(13, 2.5), (325, 0.4)], "val/auroc": []}).values()
    assert re.findall(r">([\d.]+)</text>", loss.svg()) == [
        "0",
        "0.5",
        "1",
        "1.5",
        "2",
        "2.5",
        "13",
        "100",
        "200",
        "325",
    ]
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_similar_classes_are_neighbours():
    evaluation = evaluation_of(4)
    logits = evaluation.logits.clone()
    logits[:, 2] += 9 * (evaluation.labels == 0)  # class 0 is taken for class 2
    order = Evaluation(**vars(evaluation_of(4)) | {"logits": logits}).by_similarity
    assert abs(order.index(0) - order.index(2)) == 1
    assert sorted(order) == [0, 1, 2, 3]


@pytest.mark.parametrize(("right", "count"), [(55, 94), (0, 10), (10, 10)])
def test_the_ends_of_an_interval_are_the_shares_that_the_count_just_fits(right, count):
    ends = wilson(right, count)
    for end in ends:
        error = (end * (1 - end) / count) ** 0.5
        assert abs(right / count - end) == pytest.approx(1.959964 * error, rel=1e-4, abs=1e-6)
    assert ends[0] <= right / count + 1e-9
    assert ends[1] >= right / count - 1e-9


def advice(evaluation: Evaluation, curve: LearningCurve | None = None, weights: str = "imagenet") -> str:
    module = SimpleNamespace(backbone=SimpleNamespace(weights=weights), finetuned=False)
    return verdict_of(evaluation, curve, module, "--data.root=photos", "best.ckpt").advice


def test_the_next_step_fits_the_numbers():
    evaluation = evaluation_of(4, images=2000)
    logits = torch.nn.functional.one_hot(evaluation.labels, 4) * 9.0
    with_logits = lambda changed: Evaluation(**vars(evaluation_of(4, images=2000)) | {"logits": changed})  # noqa: E731
    assert "photos from elsewhere" in advice(with_logits(logits))
    assert "other features" in advice(with_logits(logits.roll(1, dims=1)))  # all are wrong
    some_wrong = torch.cat([logits[:1900], logits[1900:].roll(1, dims=1)])
    assert "100 of 100 mistakes" in advice(with_logits(some_wrong))
    rising, flat = (LearningCurve([50, 100], [0.5, 0.5 + gain], gain, 0.01) for gain in (0.05, 0.0))
    assert "add more photos" in advice(evaluation, rising)
    assert "add more photos" in advice(evaluation_of(4, images=60), flat)
    assert "--model.weights=imagenet" in advice(evaluation, flat, "bundled")
    assert "best.ckpt" in advice(evaluation, flat)


def test_copies_across_splits_are_told():
    features = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    features[50] = features[3] + 0.01
    features[41] = features[40]  # both are validation images
    places = {"train": range(40), "val": range(40, 50), "test": range(50, 60)}
    items = {split: [Item(f"{n}.png", 0, bytes([n]), split) for n in places[split]] for split in places}
    data = SimpleNamespace(
        class_names=["a"],
        store=SimpleNamespace(cache=True),
        items_in=items.__getitem__,
        labelled=lambda split: Labelled.of(features[list(places[split])], torch.zeros(len(places[split]))),
    )
    said = "1 validation or test image(s) look almost identical to training images (50.png to 3.png)"
    assert leaks_of(data).startswith(said)
    assert leaks_of(data).endswith("by the column group of --data.csv")
    for split, of_split in items.items():  # frames of 24 scenes, which both are of one
        items[split] = [replace(item, path=f"a/s{item.digest[0] % 47 // 2}_{item.path}") for item in of_split]
    assert leaks_of(data).endswith(r"by --data.group='([^/]+?)[-_ ]?\d+\.\w+$'")
    features[50] = -features[3]
    assert leaks_of(data) == ""


def test_paths_lose_what_they_share():
    assert common_folder(["a/b/1.png", "a/b/2.png", "a/c/1.png"]) == "a/"
    assert common_folder(["/x/a/1.png"]) == "/x/a/"
    assert common_folder(["1.png", "a/2.png"]) == ""


def test_a_class_that_the_split_lacks_is_left_out_of_the_curves():
    evaluation = evaluation_of(3)
    kept = evaluation.labels != 2
    without = Evaluation(
        **{
            **vars(evaluation_of(3)),
            "labels": evaluation.labels[kept],
            "logits": evaluation.logits[kept],
            "items": [item for item, keep in zip(evaluation.items, kept.tolist(), strict=True) if keep],
        }
    )
    assert set(evaluation_figures(without)) == FIGURES


def test_tensorboard_holds_every_tag_with_the_right_values(run):
    events = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    images = {f"test/{name}" for name in FIGURES} | {f"test/{name}" for name in TILED}
    assert images <= set(events.Tags()["images"])
    assert all(len(events.Images(tag)) == 1 for tag in images)
    assert events.Tags()["graph"]
    result = json.loads((run / "result.json").read_text())
    assert {name for name in result if name.startswith("test/")} <= set(events.Tags()["scalars"])


def test_the_projector_holds_features_labels_and_predictions(run, mixed):
    config = (run / "projector_config.pbtxt").read_text()
    folder = (run / re.search(r'tensor_path: "(.+)"', config)[1]).parent
    rows = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    assert rows[0] == ["class", "prediction", "correct", "path"]
    assert len(rows) - 1 == result["images"]["test"]
    right = [row[0] == row[1] for row in rows[1:]]
    assert [row[2] == "right" for row in rows[1:]] == right
    assert sum(right) / len(right) == pytest.approx(result["test/acc"])
    assert all((mixed / row[3]).is_file() for row in rows[1:])
    vectors = np.loadtxt(folder / "tensors.tsv")
    assert vectors.shape == (len(right), 512)
    sprite = Image.open(folder / "sprite.png")
    side = int(np.ceil(np.sqrt(len(right))))
    assert sprite.size == (32 * side, 32 * side)
    drawn = np.asarray(sprite.convert("RGB")).astype(int)
    corners = {row[0]: tuple(drawn[32 * (n // side), 32 * (n % side)]) for n, row in enumerate(rows[1:])}
    assert len(set(corners.values())) == len(corners) == 3  # a frame per class
    colour = drawn[16, 16]  # of the first row's picture
    with Image.open(mixed / rows[1][3]) as image:
        assert np.abs(colour - np.asarray(image.convert("RGB")).mean(axis=(0, 1))).max() < 30


def test_the_report_holds_what_it_promises(run):
    text = (run / "report.html").read_text()
    result = json.loads((run / "result.json").read_text())
    assert len(text) < 5_000_000
    images = result["images"]["test"]
    low, high = wilson(round(result["test/acc"] * images), images)
    assert f"{100 * result['test/acc']:.1f} % of {images} test images are right" in text
    assert f"{100 * low:.1f} to {100 * high:.1f} %" in text
    assert "Always answering " in text
    assert "sets for 90 %: hold the class" in text
    assert "<b>Next:</b>" in text
    assert "blue &amp; &lt;b&gt;bold" in text
    assert "<b>bold" not in text
    assert "trainer.max_epochs: 3" in text
    assert "data.batch_size" not in text  # the default
    assert "more photos" in text
    assert f"{result['test/calibration_error']:.3f} as trained" in text
    assert f"{result['test/calibration_error_scaled']:.3f} after" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert result["seconds"]["report"] > 0


# Two frames, as wide as a screen and a phone; what each page reports after some clicks becomes the title.
FRAMES = """<body><script>
const told = {};
window.onmessage = event => { told[event.data.width] = event.data; document.title = JSON.stringify(told); };
</script>%s"""
CLICKS = """<script>
const faults = [];
window.onerror = message => faults.push(message);
window.onload = () => {
  const of = selector => document.querySelector(selector);
  const cell = [...document.querySelectorAll(".cells a")].find(a => of(a.getAttribute("href")).matches(".cell"));
  const gallery = of(cell.getAttribute("href")), hidden = getComputedStyle(gallery).display;
  cell.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
  const slider = of("#slider input"), before = of("#slider b").textContent;
  slider.value = 100; slider.dispatchEvent(new Event("input"));
  const recall = [...document.querySelectorAll("#classes th")].find(th => th.textContent === "recall");
  const column = () => [...of("#classes").tBodies[0].rows].map(row => row.cells[recall.cellIndex].textContent);
  recall.click(); const rising = column(); recall.click();
  const filter = of("[data-filter]"); filter.value = "BLUE"; filter.dispatchEvent(new Event("input"));
  const shown = [...of("#classes").tBodies[0].rows].filter(row => !row.hidden).length;
  const thumbnail = gallery.querySelector("img"); thumbnail.focus();
  const enlarged = thumbnail.getBoundingClientRect().width;
  setTimeout(() => parent.postMessage({
    width: innerWidth, wide: document.documentElement.scrollWidth, faults, hidden,
    opened: getComputedStyle(gallery).display, pictures: gallery.querySelectorAll("img").length,
    before, after: of("#slider b").textContent, rising, falling: column(), shown,
    enlarged,
    tables: Math.max(...[...document.querySelectorAll("table")].map(table => table.getBoundingClientRect().right)),
    drawn: [...document.images].every(image => image.naturalWidth > 0), text: document.body.innerText.length,
  }, "*"), 300);
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium; .ci/run installs it")
def test_the_report_can_be_explored_on_a_screen_and_a_phone(run, tmp_path):
    (tmp_path / "report.html").write_text((run / "report.html").read_text().replace("</head>", f"{CLICKS}</head>"))
    frames = [f'<iframe src="report.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in (1280, 400)]
    (tmp_path / "frames.html").write_text(FRAMES % "".join(frames))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--allow-file-access-from-files"]  # one origin, so that a frame may take the focus
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command = [BROWSER, *options, "--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(html.unescape(re.search(r"<title>(.+?)</title>", done.stdout)[1]))
    assert set(told) == {"1280", "400"}
    for width, seen in told.items():
        assert seen["faults"] == []
        assert seen["wide"] <= int(width)
        assert seen["tables"] <= int(width)  # no column is cut off
        assert (seen["hidden"], seen["opened"]) == ("none", "block")
        assert seen["pictures"] > 0
        assert "of the images are answered" in seen["before"]
        assert seen["before"] != seen["after"]
        assert seen["rising"] == sorted(seen["rising"])
        assert seen["falling"] == seen["rising"][::-1]
        assert seen["shown"] == 1
        assert seen["enlarged"] > 300
        assert seen["drawn"]
        assert seen["text"] > 1000
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("images", [30, 90])
def test_a_ridge_classifier_solves_its_normal_equations(images):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(images, 50, generator=generator).double(), torch.arange(images) % 7 // 3
    for penalty, head in zip(PENALTIES, ridge(features.float(), labels, 3), strict=True):
        weights = torch.bincount(labels).double().rsqrt()[labels]
        weights = weights / weights.mean()
        centred = features - (weights[:, None] * features).mean(dim=0)
        scatter = centred.T @ (weights[:, None] * centred)
        l2 = penalty * float(scatter.trace()) / min(images, 50)
        targets = torch.nn.functional.one_hot(labels, 3).double()
        solved = torch.linalg.solve(scatter + l2 * torch.eye(50).double(), centred.T @ (weights[:, None] * targets))
        assert torch.allclose(head.weight.T.double(), solved, atol=1e-5)


def test_stratified_shares_are_nested_and_hold_each_class():
    labels = torch.tensor([0] * 50 + [1] * 3)
    small, large = (set(stratified(labels, share, seed=0).tolist()) for share in (0.05, 0.5))
    assert small < large
    assert {int(labels[position]) for position in small} == {0, 1}
    assert len(large) == 27


@pytest.mark.parametrize(
    ("gain", "error", "advice"),
    [(0.05, 0.01, "probably help"), (0.002, 0.003, "help little"), (0.04, 0.03, "too few test images")],
)
def test_the_advice_follows_from_gain_and_error(gain, error, advice):
    assert advice in LearningCurve([50, 100], [0.5, 0.5 + gain], gain, error).advice
