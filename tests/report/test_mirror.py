"""Do left and right matter?"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from headstart import ImageFolderData, TransferClassifier
from headstart.report.mirror import MirrorCheck, _swapped, mirror_check_of
from support import RESNET18, newest_run


def arrows(folder: Path, images: int = 24) -> Path:
    """Triangles that point to the left or to the right, and discs."""
    random = np.random.default_rng(0)
    for name in ("disc", "left", "right"):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            image = Image.fromarray(random.integers(0, 60, (48, 48, 3)).astype(np.uint8))
            draw, tip = ImageDraw.Draw(image), {"left": 4, "right": 44}.get(name)
            if tip is None:
                draw.ellipse([8, 8, 40, 40], fill="white")
            else:
                draw.polygon([(tip, 24), (48 - tip, 4), (48 - tip, 44)], fill="white")
            image.save(folder / name / f"{number:02}.png")
    return folder


@pytest.mark.fault("classes that are each other's mirror image")
def test_classes_that_a_mirror_swaps_are_named(tmp_path, train, capsys):
    result = train(
        arrows(tmp_path / "arrows"), *RESNET18, "--report=true", "--trainer.max_epochs=20", "--data.val_fraction=0.4"
    )
    assert result["val/acc"] > 0.9
    said = capsys.readouterr().out
    assert "left becomes right, right becomes left" in said
    assert "--data.flip=false" in said
    assert "disc becomes" not in said
    assert "left becomes right" in (newest_run() / "report.html").read_text()


def test_symmetric_classes_are_not_spoken_of(checkpoint, trained):
    module, data = TransferClassifier.load_from_checkpoint(checkpoint), ImageFolderData(str(trained / "colours"))
    data.load(module.backbone, torch.device("cpu"))
    found = mirror_check_of(module, data)
    assert found
    assert found.images == len(data.items_in("val"))
    assert found.advice == ""


@pytest.mark.parametrize(
    ("images", "accuracy", "mirrored", "said"),
    [(100, 0.9, 0.8, True), (100, 0.9, 0.87, False), (30, 0.9, 0.8, False), (100, 0.8, 0.9, False)],
)
def test_a_small_loss_may_be_chance(images, accuracy, mirrored, said):
    assert bool(MirrorCheck(images, accuracy, mirrored, []).advice) == said


def test_a_swap_is_most_of_the_images_that_were_right():
    labels = torch.tensor([0] * 6 + [1] * 6)
    after = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0])
    assert _swapped(labels, labels, after) == [(0, 1)]
    assert _swapped(labels, 1 - labels, after) == []
