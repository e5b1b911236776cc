"""The backbone in int8, run by onnxruntime, which is several times as fast as fp32 on a CPU.

Weights are quantised per channel, and activations by their range on pictures that come with the package, so that no
row depends on the user's other images. The network is quantised once, and kept next to the features.
"""

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from headstart.errors import UserError
from headstart.features.arithmetic import BATCH, Arithmetic, dtype_of, missing_for_int8
from headstart.features.hashes import verify
from headstart.files import write_atomically
from headstart.model.backbone import FrozenBackbone
from headstart.terminal import say

# Mean cosine of the features, about their mean, with those in fp32 on the calibration pictures: lower is refused.
FLOOR = 0.98
TILES, TILE = (8, 6), 128  # of calibration.png, and the side of each in pixels
CLOUDS = 16
RECIPE = 1  # grows when the same backbone would be quantised in another way


class Int8Backbone:
    """Maps images [B, 3, H, W] uint8 on the CPU to features [B, num_features] float32.

    Raises:
        UserError: a package is missing, or the features would differ too much from those in fp32.
    """

    def __init__(self, backbone: FrozenBackbone, folder: Path) -> None:
        if lacking := missing_for_int8():
            raise UserError(f"feature_precision=int8: needs {', '.join(lacking)}: pip install -e '.[fast]'")
        import onnxruntime

        self.num_features = backbone.num_features
        self.model = _kept(backbone, folder)
        self.key = {"network": hashlib.sha256(self.model).hexdigest(), "onnxruntime": onnxruntime.__version__}
        self._session = session(self.model)

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the features."""
        return torch.from_numpy(self._session.run(None, {"images": images.numpy()})[0])


def network_of(
    backbone: FrozenBackbone, arithmetic: Arithmetic, device: torch.device, folder: Path
) -> FrozenBackbone | Int8Backbone:
    """What computes the backbone's features fast; ``folder`` keeps quantised networks."""
    if arithmetic == "int8":
        return Int8Backbone(backbone, folder)
    return backbone.for_extraction(dtype_of(arithmetic), device)


def session(model: bytes) -> Any:
    """What runs an ONNX model on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoding needs the same cores
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_onnx(module: nn.Module, example: Tensor, names: Sequence[str]) -> Any:
    """A module of one input and one output, of these ``names``, as ONNX with a dynamic batch size."""
    with _silent():
        program: Any = torch.onnx.export(
            module.eval(),
            (example.repeat(2, *[1] * (example.ndim - 1)),),
            dynamo=True,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    return program.model_proto


def quantise(backbone: FrozenBackbone) -> tuple[bytes, float]:
    """The backbone as an ONNX file in int8, and the cosine of its features with those in fp32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = calibration_images(backbone.preprocessing.crop_size)
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, made = (Path(folder) / f"{stage}.onnx" for stage in ("plain", "prepared", "made"))
        try:
            onnx.save(to_onnx(backbone, images[:1], ("images", "features")), plain)
        except Exception as error:  # the exporter raises many kinds
            raise UserError(
                f"feature_precision=int8: {backbone.name} cannot be exported to ONNX; use bf16 or fp32"
            ) from error
        with _silent():
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                made,
                _Calibration(images),
                per_channel=True,
                # Without VNNI, sums of products of 8 bits overflow.
                reduce_range=not _has_vnni(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        model = made.read_bytes()
        return model, _cosine(session(plain.read_bytes()), session(model), images)


def calibration_images(side: int) -> Tensor:
    """Crops of the drawings that come with the package, and clouds of noise as smooth as photographs.

    The same in each call -> [64, 3, side, side] uint8.
    """
    random, images = np.random.default_rng(0), []
    with resources.files("headstart").joinpath("weights/calibration.png").open("rb") as file:
        sheet = Image.open(file).convert("RGB")
    for place in range(TILES[0] * TILES[1]):
        size = random.uniform(0.3 * TILE, TILE)
        left, top = random.uniform(0, TILE - size, 2) + np.array([place % TILES[0], place // TILES[0]]) * TILE
        box = left, top, left + size, top + size
        images.append(np.asarray(sheet.resize((side, side), Image.Resampling.BILINEAR, box)).transpose(2, 0, 1))
    distance = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    distance[0, 0] = 1
    for _ in range(CLOUDS):
        spectrum = np.fft.fft2(random.normal(size=(3, side, side))) / distance ** random.uniform(0.7, 1.5)
        cloud = np.tensordot(random.normal(1, 0.3, (3, 3)), np.fft.ifft2(spectrum).real, 1)  # colours go together
        cloud = (cloud - cloud.mean()) / cloud.std() * random.uniform(30, 70) + random.uniform(80, 170)
        images.append(cloud.clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(images))


class _Calibration:
    """Batches of one image, as onnxruntime asks for them."""

    def __init__(self, images: Tensor) -> None:
        self._images = iter(torch.split(images, 1))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"images": image.numpy()}


def _kept(backbone: FrozenBackbone, folder: Path) -> bytes:
    """The quantised network: the one of an earlier call with the same backbone and libraries, or a new one."""
    import onnxruntime

    about = {
        "backbone": [backbone.digest(), backbone.name, backbone.layers, getattr(backbone.net, "mirror", None)],
        "side": backbone.preprocessing.crop_size,
        "recipe": [RECIPE, _has_vnni()],
        "versions": [onnxruntime.__version__, torch.__version__, *backbone.versions.items()],
    }
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    folder = folder / "int8"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            for path in folder.glob(f"{name}-*.onnx"):
                with suppress(ValueError):  # damaged
                    verify(path)
                    with suppress(OSError):  # of another user
                        path.touch()  # the date of the last use, for pruning
                    return path.read_bytes()
                path.unlink()
            model = _checked(backbone)
            with suppress(OSError):  # a full disk
                write_atomically(folder / f"{name}-{hashlib.sha256(model).hexdigest()}.onnx", model)
            return model
    except OSError:  # not writable
        return _checked(backbone)


def _checked(backbone: FrozenBackbone) -> bytes:
    """The network newly quantised; ``UserError`` if its features differ too much from those in fp32."""
    started = time.perf_counter()
    model, cosine = quantise(backbone)
    if not cosine >= FLOOR:
        differ = f"differ too much from those in fp32 (cosine {cosine:.3f}, below {FLOOR})"
        raise UserError(f"feature_precision=int8: the features of {backbone.name} {differ}; use bf16 or fp32")
    say(f"features: {backbone.name} quantised in {time.perf_counter() - started:.0f} s; cosine with fp32 {cosine:.4f}")
    return model


def _has_vnni() -> bool:
    """Whether the processor multiplies and adds 8-bit numbers in 32 bits."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def _cosine(plain: Any, quantised: Any, images: Tensor) -> float:
    """The mean cosine of two sessions' features about their mean, without which untrained networks' are all alike."""
    found = []
    for each in (plain, quantised):
        parts = [each.run(None, {"images": batch.numpy()})[0] for batch in torch.split(images, BATCH)]
        found.append(torch.from_numpy(np.concatenate(parts)))
    centre = found[0].mean(dim=0)
    return float(functional.cosine_similarity(found[0] - centre, found[1] - centre).mean())


@contextmanager
def _silent() -> Iterator[None]:
    """Hides the warnings of the exporter and the quantiser about their own code."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
