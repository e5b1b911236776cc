"""How familiar an image is: the distance, against scikit-learn and scipy, and what it promises."""

from math import sqrt

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf

from headstart.model.known import Known, unknown_scores


def drawn(images: int, width: int = 40, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features like a backbone's, with some that are always zero; of classes 0, 1, … except the second."""
    shape = torch.Generator().manual_seed(99)
    means, mixing = torch.rand(classes, width, generator=shape), torch.randn(width, width, generator=shape) / width**0.5
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (images,), generator=generator)
    labels += labels >= 1
    features = (means[labels] + torch.randn(images, width, generator=generator) @ mixing).relu()
    features[:, :3] = 0
    return features, labels


@pytest.mark.parametrize("images", [30, 5000])  # fewer than features, and more than are converted at once
def test_the_distance_is_mahalanobis_with_ledoit_and_wolfs_covariance(images):
    (features, labels), (others, _) = drawn(images), drawn(200, seed=1)
    known = Known.fit(features, labels, others)
    means = np.stack([features[labels == label].double().mean(dim=0) for label in labels.unique()])
    centred = features.double().numpy() - means[np.unique(labels, return_inverse=True)[1]]
    covariance = LedoitWolf(assume_centered=True).fit(centred).covariance_
    wanted = cdist(others.double(), means, "mahalanobis", VI=np.linalg.inv(covariance)).min(axis=1)
    assert known.distance(others).numpy() == pytest.approx(wanted, rel=1e-5)  # as ONNX computes it
    assert known.double().distance(others).numpy() == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(known.distances.float(), known.distance(others).sort().values)


def test_a_share_of_the_images_is_refused_as_promised():
    features, labels = drawn(300)
    rates = []
    for seed in range(200):
        both = drawn(80 + 100, seed=1 + seed)[0]
        known = Known.fit(features, labels, both[:80]).double()
        shares = known(both[80:])
        assert shares.min() >= 1 / 81
        rates.append(float((shares <= 0.1).double().mean()))
    promised = 8 / 81  # of ranks; 0.1 is not a multiple of 1 / 81
    assert np.mean(rates) == pytest.approx(promised, abs=3 * np.std(rates) / sqrt(len(rates)))
    far = 10 + features[:20]
    assert (known(far) == 1 / 81).all()


def test_classes_without_any_spread_have_no_distance():
    features = torch.eye(4)
    assert Known.fit(features, torch.arange(4), features) is None


def test_auroc_and_false_positives_count_as_by_hand():
    own = torch.arange(1.0, 101)
    assert unknown_scores(own, torch.tensor([0.0, 50, 95, 200])) == {
        "unknown/auroc": pytest.approx((0 + 0.495 + 0.945 + 1) / 4),
        "unknown/fpr95": 0.75,
        "unknown/images": 4,
    }
