"""The verb `export`: a trained head and its backbone in one file that needs no headstart."""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart import __version__
from headstart.data import folders
from headstart.errors import UserError
from headstart.files import write_atomically
from headstart.images import UnreadableImage, decode, preprocess
from headstart.model.backbone import torchvision_model
from headstart.model.classifier import TransferClassifier, load_head
from headstart.parser import parser_of, required
from headstart.report.evaluation import spread
from headstart.runs.folder import files_of_run
from headstart.terminal import be_calm, say

# The exported model's probabilities may differ by so much from those of the fp32 model.
TOLERANCE = 1e-4
MAX_COMPARED = 32
EXTRA = ("onnx", "onnxscript", "onnxruntime")


class Exported(nn.Module):
    """Images [B, 3, H, W] uint8, resized and cropped -> calibrated probabilities [B, C]."""

    def __init__(self, module: TransferClassifier) -> None:
        super().__init__()
        self.backbone, self.head, self.temperature = module.backbone, module.head, module.temperature

    def forward(self, images: Tensor) -> Tensor:
        """Normalises, computes features and logits, and scales them."""
        return torch.softmax(self.head(self.backbone(images)) / self.temperature, dim=1)


def export(options: Sequence[str]) -> dict[str, Any]:
    """Writes a model file, which was compared with the checkpoint on real images before.

    Args:
        options: of the command line.

    Returns:
        The `output`, how many `images` were compared, and the largest `difference` of a probability.

    Raises:
        UserError: a mistake in the options; or the exported model computes something else, and nothing is written.
    """
    be_calm()
    parser = parser_of("export")
    parser.add_argument("--ckpt_path", type=str | None, help="of a trained head, such as logs/…/checkpoints/best.ckpt")
    parser.add_argument("--output", type=str | None, help="a new .onnx file, or .pth for torchvision's own model")
    parser.add_argument("--data.root", type=str | None, help="images to compare on; None: those of the head's own run")
    given = parser.parse_args(list(options))
    required(given, "--ckpt_path", "--output")
    checkpoint, output = Path(given.ckpt_path).expanduser(), Path(given.output).expanduser()
    if output.exists():
        raise UserError(f"--output={output}: is there already; give another name")
    makers = {".onnx": (to_onnx, run_onnx), ".pth": (to_torchvision, run_torchvision)}
    if output.suffix not in makers:
        raise UserError(f"--output={output}: name it {' or '.join(f'*{suffix}' for suffix in makers)}")
    if output.suffix == ".onnx" and (lacking := [name for name in EXTRA if importlib.util.find_spec(name) is None]):
        raise UserError(f"--output={output}: needs {', '.join(lacking)}: pip install 'headstart[export]'")
    module = load_head(checkpoint)
    images = _real_images(module, given.data.root, checkpoint)
    make, run = makers[output.suffix]
    data = make(module)
    with torch.no_grad():
        difference = float((run(data, module, images) - Exported(module)(images)).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(f"--output={output}: its probabilities differ by {difference:.1e} from the head's; not written")
    try:
        write_atomically(output, data)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror})") from error
    say(f"export:  {output}, {len(data) / 1e6:.1f} MB; on {len(images)} images within {difference:.1e} of the head")
    say("next:    the README runs it in ten lines, without headstart")
    return {"output": str(output), "images": len(images), "difference": difference}


def to_onnx(module: TransferClassifier) -> bytes:
    """ONNX, of any number of images; class names and preprocessing are JSON in its metadata."""
    import onnx

    images = module.example_input_array
    assert isinstance(images, Tensor)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its own calls
        program: Any = torch.onnx.export(
            Exported(module).eval(),
            (images.repeat(2, 1, 1, 1),),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    model = program.model_proto
    about = {
        "class_names": module.class_names,
        "preprocessing": asdict(module.backbone.preprocessing),
        "temperature": module.temperature,
        "made_by": f"headstart {__version__}",
    }
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def run_onnx(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities that onnxruntime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def to_torchvision(module: TransferClassifier) -> bytes:
    """A state dict of torchvision's own model with the new classifier, in which the temperature is contained."""
    net, path = module.backbone.net, module.backbone.classifier_path
    head = {f"{path}.{name}": tensor / module.temperature for name, tensor in module.linear.state_dict().items()}
    file = io.BytesIO()
    torch.save({name: tensor.detach().clone() for name, tensor in (net.state_dict() | head).items()}, file)
    return file.getvalue()


def run_torchvision(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities of torchvision's own model; normalisation is its caller's."""
    backbone = module.backbone
    net = torchvision_model(backbone.name)
    net.set_submodule(backbone.classifier_path, nn.Linear(backbone.num_features, len(module.class_names)))
    net.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    logits: Tensor = net.eval()((images.float() - backbone.mean) / backbone.std)
    return logits.softmax(dim=1)


def _real_images(module: TransferClassifier, root: str | None, checkpoint: Path) -> Tensor:
    """Up to 32 readable images, evenly spread, as the backbone takes them: [B, 3, H, W] uint8.

    They are of the given folder, else those that the head's own run split.
    """
    found = folders.images(Path(root).expanduser()) if root else files_of_run(checkpoint)
    wanted = [found[position] for position in spread(len(found), MAX_COMPARED).tolist()]
    preprocessing, images = module.backbone.preprocessing, []
    for path in wanted:
        try:
            images.append(preprocess(decode(path.read_bytes(), preprocessing.resize_size), preprocessing))
        except (UnreadableImage, OSError):
            continue
    if not images:
        raise UserError(f"--data.root={root}: no readable image to compare the export on; give a folder of some")
    return torch.stack(images)
