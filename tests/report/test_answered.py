"""Accuracy against the share of images that are answered."""

import torch

from headstart.data.splits import Item
from headstart.report.answered import answered, answered_table
from headstart.report.evaluation import Evaluation


def evaluation_of(confidence: list[float], right: list[bool]) -> Evaluation:
    """Two classes; each image's best one has this probability."""
    first = torch.tensor(confidence)
    return Evaluation(
        split="test",
        class_names=["a", "b"],
        items=[Item(f"{number}.png", 0) for number in range(len(confidence))],
        labels=1 - torch.tensor(right).long(),
        logits=torch.stack([first, 1 - first], dim=1).log(),
        temperature=1.0,
        projected=torch.empty(0),
        features=torch.empty(0),
    )


def test_the_curve_counts_as_by_hand():
    curve = answered(evaluation_of([0.6, 0.9, 0.8, 0.8, 0.7], [False, True, True, False, True]))
    torch.testing.assert_close(curve.probability, torch.tensor([0.9, 0.8, 0.7, 0.6]))
    assert curve.share.tolist() == torch.tensor([1 / 5, 3 / 5, 4 / 5, 1]).tolist()
    torch.testing.assert_close(curve.accuracy, torch.tensor([1, 2 / 3, 3 / 4, 3 / 5], dtype=torch.float64))


def test_the_threshold_answers_as_many_images_as_it_may():
    curve = answered(evaluation_of([0.6, 0.9, 0.8, 0.8, 0.7], [False, True, True, False, True]))
    probability, share, accuracy = curve.at(0.75)
    assert (round(probability, 6), round(share, 6), accuracy) == (0.7, 0.8, 0.75)
    assert curve.at(0.99)[1:] == (torch.tensor(0.2).item(), 1.0)
    assert curve.at(0.6) == (0.0, 1.0, 0.6)  # all may be answered
    assert answered(evaluation_of([0.9, 0.8], [False, True])).at(0.9) is None


def test_the_table_has_a_row_for_each_accuracy():
    table = answered_table(evaluation_of([0.9, 0.8], [False, True]))
    assert [list(column.cells) for column in table.columns] == [["90%", "95%", "99%"], ["-"] * 3, ["none"] * 3]
