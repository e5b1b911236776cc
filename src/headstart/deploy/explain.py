"""Class activation maps of a linear head, exact and without a backward pass."""

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from headstart.errors import UserError
from headstart.model.backbone import FrozenBackbone


class ClassActivation:
    """Class activation maps of the images in a backbone's last batch; ``weight`` is the head's, [C, D].

    The features are the spatial mean of the last feature map, and the head is linear, so each logit is the spatial mean
    of <weight, feature map>, plus the bias: that product is the exact map. A backbone with other features is an error.
    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """

    def __init__(self, backbone: FrozenBackbone, weight: Tensor) -> None:
        self._weight = weight
        self._map = torch.empty(0)
        pools = [module for module in backbone.net.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
        side = backbone.preprocessing.crop_size
        images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=backbone.mean.device)
        if pools:
            pools[-1].register_forward_pre_hook(self._keep)
            with torch.no_grad():
                features = backbone(images)
        if not pools or not _close(self._map, features):
            raise UserError(f"--explain: the features of {backbone.name} are not a spatial mean; use a resnet")

    def __call__(self, labels: Tensor) -> Tensor:
        """Maps [B, h, w] of one class per image, for the first B images of the last batch."""
        maps = self._map[: len(labels)].float().cpu()
        return torch.einsum("bchw,bc->bhw", maps, self._weight[labels])

    def _keep(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self._map = inputs[0].detach()


def _close(feature_map: Tensor, features: Tensor) -> bool:
    """Whether the features are the spatial mean of the map, within bf16's precision."""
    if feature_map.ndim != 4 or feature_map.shape[:2] != features.shape:
        return False
    return torch.allclose(feature_map.float().mean(dim=(2, 3)), features, rtol=0.05, atol=0.05)


def overlay(pixels: Tensor, heat: Tensor) -> Image.Image:
    """Blends a picture [3, H, W] uint8 with its map [h, w]; yellow is evidence for the class, dark blue is not."""
    positive = heat.clamp(min=0) / heat.max().clamp(min=1e-12)
    sized = functional.resize(positive[None], list(pixels.shape[1:]), antialias=True)[0]
    colour = torch.from_numpy(colormaps["cividis"](sized.numpy())[..., :3]).permute(2, 0, 1)
    mixed = 0.5 * pixels / 255 + 0.5 * colour
    picture: Image.Image = functional.to_pil_image((mixed * 255).round().to(torch.uint8))
    return picture
