"""Cuts a backbone in two at a layer: a frozen front, whose output is cached, and a back, which is trained."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.passes.split_module import split_module

from headstart.errors import UserError
from headstart.model.backbone import FrozenBackbone


class Front(FrozenBackbone):
    """The layers before the unfrozen ones, as a backbone whose output is cached like any features.

    It shares its tensors with the whole backbone. ``shape`` is the shape of its output per image, such as (256, 8, 8).
    """

    def __init__(self, whole: FrozenBackbone, layers: nn.Module, before: str) -> None:
        side = whole.preprocessing.crop_size
        with torch.no_grad():
            shape = layers(torch.zeros(1, 3, side, side, device=whole.mean.device)).shape[1:]
        net = nn.Sequential(layers, nn.Flatten())
        self.adopt(f"{whole.name} before {before}", whole.weights, net, whole.preprocessing, whole.versions)
        self.layers, self.shape = whole.layers, tuple(shape)


def learning_names(net: nn.Module, unfreeze: str) -> list[str]:
    """The names of the parameters and buffers from the named layer to the last, in the order of the network."""
    names = list(net.state_dict())
    if unfreeze == "all":
        return names
    inside = [place for place, name in enumerate(names) if name.startswith(f"{unfreeze}.")]
    if not inside:
        layers = [name for name, child in net.named_children() if any(True for _ in child.parameters())]
        raise UserError(f"--unfreeze={unfreeze}: not a trainable layer; give all, or one such as {', '.join(layers)}")
    return names[inside[0] :]


def cut(backbone: FrozenBackbone, unfreeze: str) -> tuple[Front, nn.Module] | None:
    """Splits the backbone before the named layer; None if more than one value passes between the two parts."""
    if unfreeze == "all":
        return None
    parts = _by_graph(backbone.net, unfreeze) or _by_running(backbone, unfreeze)
    return (Front(backbone, parts[0], unfreeze), parts[1]) if parts else None


def _by_graph(net: nn.Module, unfreeze: str) -> tuple[nn.Module, nn.Module] | None:
    """The parts of the graph that torch.fx makes of the network."""
    try:
        traced = symbolic_trace(net)
        place = {node: number for number, node in enumerate(traced.graph.nodes)}
        own = [number for node, number in place.items() if f"{node.target}.".startswith(f"{unfreeze}.")]
        first = min(own, default=0)
        parts: Any = split_module(traced, net, lambda node: int(place[node] >= first))
    except Exception:  # fx raises many kinds of errors on data-dependent Python
        return None
    calls = [node for node in parts.graph.nodes if node.op == "call_module"]
    if first == 0 or [len(call.args) for call in calls] != [1, 1]:
        return None
    return parts.get_submodule(calls[0].target), parts.get_submodule(calls[1].target)


def _by_running(backbone: FrozenBackbone, unfreeze: str) -> tuple[nn.Module, nn.Module] | None:
    """The whole network twice: run up to the layer, and with the layer's input replaced.

    For networks that torch.fx cannot follow, and whose batch size is used on both sides, as in vision transformers.
    """
    net, side = backbone.net, backbone.preprocessing.crop_size
    try:
        front, back = _Before(net, unfreeze, learning_names(net, unfreeze)), _After(net, unfreeze, side)
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(backbone.mean.device)
        return (front, back) if _give_the_whole(front, back, images) else None
    except Exception:  # the network's own, where a layer that learns runs before the cut or takes no tensor
        return None


def _give_the_whole(front: "_Before", back: "_After", images: Tensor) -> bool:
    """Whether the two parts give what the network gives, and nothing but the front's output connects them."""
    with torch.no_grad():
        maps, features = front(images), back.net(images)
        again = back(maps)
    if maps.shape == images.shape or len(maps) != len(images) or again.shape != features.shape:
        return False
    with torch.enable_grad(), _input_replaced(back.layer, maps):
        connected = back.net(images.requires_grad_()).requires_grad  # by another way than through the layer's input
    return not connected and torch.allclose(again, features, rtol=1e-3, atol=1e-5)


class _Reached(Exception):
    """The network came to the layer, with this input."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Stop(nn.Module):
    """Stands in the place of the layer."""

    def forward(self, tensor: Tensor, *others: Any, **named: Any) -> None:
        raise _Reached(tensor)


class _Before(nn.Module):
    """From images to the layer's input: a copy of the network that shares its tensors, without those that learn."""

    def __init__(self, net: nn.Module, layer: str, learning: Sequence[str]) -> None:
        super().__init__()
        self.net = copy.deepcopy(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})
        for name in learning:
            owner, _, own = name.rpartition(".")
            delattr(self.net.get_submodule(owner), own)
        self.net.set_submodule(layer, _Stop())

    def forward(self, images: Tensor) -> Tensor:
        try:
            self.net(images)
        except _Reached as reached:
            return reached.tensor
        raise RuntimeError("the network never came to the layer")


class _After(nn.Module):
    """From the layer's input to features: the network itself, on one blank image up to the layer."""

    def __init__(self, net: nn.Module, layer: str, side: int) -> None:
        super().__init__()
        self.net, self.layer, self.side = net, net.get_submodule(layer), side

    def forward(self, maps: Tensor) -> Tensor:
        with _input_replaced(self.layer, maps):
            features: Tensor = self.net(maps.new_zeros(1, 3, self.side, self.side))
        return features


@contextmanager
def _input_replaced(layer: nn.Module, maps: Tensor) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(lambda _, inputs: (maps, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
