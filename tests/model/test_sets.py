"""Sets of classes that hold the truth as often as promised."""

from math import sqrt

import numpy as np
import pytest
import torch

from headstart.model.sets import images_needed, set_scores, sets_of, threshold, true_probabilities


def drawn(images: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of a head that is right on about half of the images, and too sure of itself."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits += 2 * torch.nn.functional.one_hot(labels, classes)
    return (2 * logits).softmax(dim=1), labels


@pytest.mark.parametrize(("images", "classes"), [(90, 12), (45, 40)])
@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_hold_the_truth_as_often_as_promised(images, classes, coverage):
    """On 500 random splits into validation and test, the rate is what theory says: no less and no more."""
    rates = []
    for seed in range(500):
        (validation, labels), (probabilities, truth) = drawn(images, classes, seed), drawn(100, classes, 1000 + seed)
        least = threshold(true_probabilities(validation, labels), coverage)
        sets = sets_of(probabilities, least)
        rates.append(float(sets.gather(1, truth[:, None]).double().mean()))
    wanted = np.ceil((images + 1) * coverage - 1e-9) / (images + 1)
    assert wanted >= coverage
    assert np.mean(rates) == pytest.approx(wanted, abs=3 * np.std(rates) / sqrt(len(rates)))


@pytest.mark.parametrize(("coverage", "needed"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.7, 3)])
def test_the_least_number_of_images_is_enough_and_one_less_is_not(coverage, needed):
    assert images_needed(coverage) == needed
    least = torch.linspace(0.1, 0.9, needed)
    assert threshold(least, coverage) == pytest.approx(0.1)
    assert (needed - 1) / needed < coverage  # the chance that one more is not below all of them


def test_the_most_probable_class_is_always_in_the_set():
    sets = sets_of(torch.tensor([[0.4, 0.3, 0.3], [0.8, 0.15, 0.05], [0.5, 0.5, 0.0]]), least=0.7)
    assert sets.tolist() == [[True, False, False], [True, False, False], [True, True, False]]


def test_scores_of_sets_count_as_by_hand_and_want_enough_images():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.25, 0.7, 0.05]])
    labels = torch.tensor([0, 2, 2])
    validation = torch.tensor([0.2] + [0.9] * 8)
    assert set_scores(validation, probabilities, labels) == {
        "test/coverage_90": pytest.approx(2 / 3),
        "test/set_size_90": pytest.approx((2 + 2 + 2) / 3),
    }
    assert set_scores(validation[:8], probabilities, labels) == {}
