"""Figures, TensorBoard and the report: right values, read back; the report in a real browser."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headstart.cli import main
from headstart.data.splits import Item
from headstart.model.calibration import Logits, fit_temperature
from headstart.report.evaluation import Evaluation, evenly_spaced
from headstart.report.figures import curves_figure, evaluation_figures, png
from headstart.report.learning_curve import LearningCurve, stratified
from support import COLOURS, draw, newest_run

FIGURES = {"confusion_matrix", "confusion_normalised", "per_class", "roc", "precision_recall", "reliability"}
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
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HEADSTART_CACHE", str(folder / "cache"))
        patched.chdir(folder)
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
    figures = evaluation_figures(evaluation_of(classes))
    assert set(figures) == FIGURES
    for drawn in figures.values():
        pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("L"))
        assert max(pixels.shape) <= 1800
        assert 0.005 < (pixels < 128).mean() < 0.6
    assert sum(map(len, figures.values())) < 1_500_000
    assert png(curves_figure({"val/acc": [(1, 0.5), (2, 0.7)]}))


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
    images = {f"test/{name}" for name in FIGURES} | {"test/worst_mistakes", "test/surest_right"}
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
    colour = np.asarray(sprite.convert("RGB"))[16, 16]  # of the first row's picture
    with Image.open(mixed / rows[1][3]) as image:
        assert np.abs(colour.astype(int) - np.asarray(image.convert("RGB")).mean(axis=(0, 1))).max() < 30


def test_the_report_holds_what_it_promises(run):
    text = (run / "report.html").read_text()
    result = json.loads((run / "result.json").read_text())
    assert len(text) < 5_000_000
    assert f"{100 * result['test/acc']:.1f} % right" in text
    assert "blue &amp; &lt;b&gt;bold" in text
    assert "<b>bold" not in text
    assert "max_epochs: 3" in text
    assert "more photos" in text
    assert f"{result['test/calibration_error']:.3f} as trained" in text
    assert f"{result['test/calibration_error_scaled']:.3f} after" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert result["seconds"]["report"] > 0


MEASURE = """<body style="margin:0"><iframe id="page" style="width:%dpx;height:900px;border:0" srcdoc="%s"></iframe>
<script>window.onload = () => {
  const page = document.getElementById("page").contentDocument;
  const images = [...page.images];
  document.title = JSON.stringify({
    wide: page.documentElement.scrollWidth, room: page.documentElement.clientWidth,
    images: images.length, drawn: images.filter(image => image.naturalWidth > 0).length,
    text: page.body.innerText.length});
}</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium; .ci/run installs it")
def test_the_report_fits_a_screen_and_a_phone(run, tmp_path):
    import html

    report = (run / "report.html").read_text()
    for width in (1280, 400):
        page = tmp_path / f"{width}.html"
        page.write_text(MEASURE % (width, html.escape(report)))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += [f"--user-data-dir={tmp_path / 'browser' / str(width)}", "--enable-logging=stderr"]
        command = [BROWSER, *options, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        seen = json.loads(html.unescape(re.search(r"<title>(.+?)</title>", done.stdout)[1]))
        assert seen["room"] == width or seen["room"] == width - 15  # beside a scroll bar
        assert seen["wide"] <= seen["room"]
        assert seen["images"] == seen["drawn"] > 10
        assert seen["text"] > 1000
        assert "CONSOLE" not in done.stderr


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
