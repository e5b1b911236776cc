"""More than the last layer: the mean of each stage's output, as features."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from headstart.errors import UserError

STAGES = 4  # the last ones; before them is the stem
DEPTH = 2  # of the modules among which stages are looked for, such as layer1 or features.3


class Stages(nn.Module):
    """A network whose features are the spatial means of its stages' outputs, concatenated.

    Each mean is replaced by its signed root, since deeper ones are smaller. After Head2Toe, Evci et al., ICML 2022.

    Args:
        net: maps images [B, 3, side, side] to features, and has stages, which end where the resolution falls.
        side: of its input, in pixels.
        mirror: average the features over the image and its mirror image.

    Raises:
        UserError: the network has no such stages; ``name`` is what it is called.
    """

    def __init__(self, net: nn.Module, name: str, side: int, mirror: bool) -> None:
        super().__init__()
        self.mirror, found = mirror, _stages_of(net, side)
        try:
            assert len(found) > 1
            self.net: Any = create_feature_extractor(net, return_nodes=found)
        except Exception as error:  # torch.fx raises many kinds at data-dependent Python
            raise UserError(f"--model.layers=all: {name} has no stages that can be told apart; a resnet has") from error

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, the sum of the stages' channels]."""
        # One pass: torch.fx would fold a BatchNorm into its convolution once for each.
        seen = torch.cat([images, images.flip(-1)]) if self.mirror else images
        means = torch.cat([output.mean(dim=(2, 3)) for output in self.net(seen).values()], dim=1)
        features = means.sign() * means.abs().sqrt()
        if not self.mirror:
            return features
        halves = features.chunk(2)
        return (halves[0] + halves[1]) / 2


@torch.no_grad()
def _stages_of(net: nn.Module, side: int) -> list[str]:
    """The module after which the resolution falls, for the last resolutions, in order."""
    last: dict[int, str] = {}  # the last module's path by the height of its output

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3] > 1:
                last[output.shape[2]] = path

        return hook

    paths = [(path, module) for path, module in net.named_modules() if path and path.count(".") < DEPTH]
    handles = [module.register_forward_hook(note(path)) for path, module in paths]
    try:
        net(torch.zeros(1, 3, side, side))
    finally:
        for handle in handles:
            handle.remove()
    return [last[height] for height in sorted(last, reverse=True)][-STAGES:]
