"""How familiar an image looks: its distance from the classes, as a share of the validation images."""

import torch
from torch import Tensor, nn

from headstart.model.metrics import auroc

ROWS = 4096  # features converted to float64 at a time


class Known(nn.Module):
    """Features [B, D] -> the share of validation images that lie at least as far from every class, [B] in (0, 1].

    The Mahalanobis distance to the nearest class mean, with one covariance for all classes: Lee et al., "A Simple
    Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018. An image itself
    counts as a validation image, so that at most a share a of images like these gets a value of a or less.

    Args:
        whitening: the matrix that makes the covariance the identity, [D, D].
        centre: the mean of the class means, [D].
        means: the class means, centred and whitened, [C, D].
        distances: the distances of the N validation images, ascending, [N].
    """

    whitening: Tensor
    centre: Tensor
    means: Tensor
    distances: Tensor

    def __init__(self, whitening: Tensor, centre: Tensor, means: Tensor, distances: Tensor) -> None:
        super().__init__()
        self.register_buffer("whitening", whitening)
        self.register_buffer("centre", centre)
        self.register_buffer("means", means)
        self.register_buffer("distances", distances)

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, val_features: Tensor) -> "Known | None":
        """From features [M, D] and labels [M] of the training, and validation features [N, D]; None: no covariance."""
        means, covariance = class_statistics(features, labels)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            return None
        whitening = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
        centre = means.mean(dim=0)
        white = (means - centre) @ whitening.T
        known = cls(whitening.float(), centre.float(), white.float(), torch.empty(0)).double()  # rounded as stored
        found = [known.distance(rows) for rows in torch.split(val_features, ROWS)]
        known.distances = torch.cat(found).sort().values
        return known.float()

    def distance(self, features: Tensor) -> Tensor:
        """The Mahalanobis distance to the nearest class mean, computed in the module's precision -> [B] float32."""
        white, means = (features.to(self.centre) - self.centre) @ self.whitening.T, self.means
        squares = white.square().sum(dim=1, keepdim=True) - 2 * white @ means.T + means.square().sum(dim=1)
        return squares.amin(dim=1).clamp(min=0).sqrt().float()

    def forward(self, features: Tensor) -> Tensor:
        return self.share(self.distance(features))

    def share(self, distances: Tensor) -> Tensor:
        """The share of validation images at least as far as each of the distances [B]."""
        farther = (self.distances >= distances[:, None]).sum(dim=1)
        return (1 + farther).float() / (1 + len(self.distances))


def unknown_scores(own: Tensor, unknown: Tensor) -> dict[str, float]:
    """How well distances separate unknown images from known ones: AUROC, and false positives at 95 %.

    The latter is the share of unknown images within the distance that contains 95 % of the known ones.
    """
    limit = own.sort().values[-(-95 * len(own) // 100) - 1]
    return {
        "unknown/auroc": auroc(unknown, own),
        "unknown/fpr95": float((unknown <= limit).double().mean()),
        "unknown/images": len(unknown),
    }


def class_statistics(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The means [C, D] of the classes present, and the covariance [D, D] around them, shrunk; float64.

    It is shrunk to a multiple of the identity, as by scikit-learn's ``LedoitWolf(assume_centered=True)``: Ledoit and
    Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    """
    (count, width), labels = features.shape, torch.unique(labels.cpu(), return_inverse=True)[1]
    sums = torch.zeros(int(labels.max()) + 1, width, dtype=torch.float64)
    for rows, own in zip(torch.split(features, ROWS), torch.split(labels, ROWS), strict=True):
        sums.index_add_(0, own, rows.cpu().double())
    means = sums / labels.bincount()[:, None]
    scatter, fourth = torch.zeros(width, width, dtype=torch.float64), 0.0
    for rows, own in zip(torch.split(features, ROWS), torch.split(labels, ROWS), strict=True):
        centred = rows.cpu().double() - means[own]
        scatter.addmm_(centred.T, centred)
        fourth += float(centred.square().sum(dim=1).square().sum())
    covariance = scatter / count
    scale, total = float(covariance.trace()) / width, float(covariance.square().sum())
    spread = total - width * scale**2  # the covariance's squared distance from the target, in all entries
    noise = (fourth / count - total) / count  # and that from its own estimate
    shrinkage = min(noise / spread, 1.0) if spread > 0 else 1.0
    return means, (1 - shrinkage) * covariance + shrinkage * scale * torch.eye(width, dtype=torch.float64)
