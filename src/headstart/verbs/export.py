"""The `export` command: writes a trained head and its backbone to one file that does not need headstart."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.data import folders
from headstart.decoding import UnreadableImage, decode
from headstart.deploy.check import check_files
from headstart.deploy.onnx import NEEDED, Exported, run_onnx, to_onnx
from headstart.deploy.torchvision import run_torchvision, to_torchvision
from headstart.errors import UserError
from headstart.files import claim_by_rename, new_path, read_regular, write_new
from headstart.images import preprocess
from headstart.model.classifier import TransferClassifier
from headstart.parser import add_checkpoint, parser_of, required
from headstart.report.evaluation import evenly_spaced
from headstart.runs.history import Run
from headstart.terminal import quiet_libraries, say

# Maximum difference of the exported model's probabilities from those of the fp32 model.
TOLERANCE = 1e-4
MAX_COMPARED = 32
MAKERS = {".onnx": (to_onnx, run_onnx), ".pth": (to_torchvision, run_torchvision)}


def export(options: Sequence[str]) -> dict[str, Any]:
    """Writes a model file if its probabilities on real images match the checkpoint's.

    Next to it goes a folder of five pictures with their expected probabilities.

    Returns the `output`, the number of `images` compared, and the largest `difference` of a probability.
    """
    quiet_libraries()
    parser = parser_of("export")
    add_checkpoint(parser)
    parser.add_argument("--output", type=str | None, help="new .onnx file, or .pth for torchvision's own model")
    parser.add_argument("--data.root", type=str | None, help="images to compare on; None: those of the head's run")
    given = parser.parse_args(list(options))
    required(given, "--ckpt_path", "--output")
    checkpoint, output = Path(given.ckpt_path).expanduser(), new_path("--output", given.output)
    pictures = new_path("--output", f"{output}.check")
    if output.suffix not in MAKERS:
        raise UserError(f"--output={output}: name it {' or '.join(f'*{suffix}' for suffix in MAKERS)}")
    if output.suffix == ".onnx" and (lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
        raise UserError(f"--output={output}: needs {', '.join(lacking)}: pip install -e '.[export]'")
    module = TransferClassifier.load_from_checkpoint(checkpoint).eval()
    images = _real_images(module, given.data.root, checkpoint)
    make, run = MAKERS[output.suffix]
    data = make(module)
    with torch.no_grad():
        difference = float((run(data, module, images) - Exported(module)(images)).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(f"--output={output}: its probabilities differ by {difference:.1e} from the head's; not written")
    with claim_by_rename(pictures) as folder:
        for name, content in check_files(module).items():
            (folder / name).write_bytes(content)
    write_new("--output", output, data)
    say(f"export:  {output}, {len(data) / 1e6:.1f} MB; on {len(images)} images within {difference:.1e} of the head")
    say(f"check:   {pictures}, five pictures with their expected probabilities")
    say("next:    docs/deploy.md shows how to run and check it without headstart")
    return {"output": str(output), "images": len(images), "difference": difference}


def _real_images(module: TransferClassifier, root: str | None, checkpoint: Path) -> Tensor:
    """Up to 32 readable images of the given folder or the head's run, evenly spread: [B, 3, H, W] uint8."""
    found = folders.images(Path(root).expanduser()) if root else Run.of(checkpoint).images()
    wanted = [found[position] for position in evenly_spaced(len(found), MAX_COMPARED).tolist()]
    preprocessing, images = module.backbone.preprocessing, []
    for path in wanted:
        try:
            images.append(preprocess(decode(read_regular(path), preprocessing), preprocessing))
        except (UnreadableImage, OSError):
            continue
    if not images:
        where = f"--data.root={root}: no" if root else "--data.root is missing: the head's run has no"
        raise UserError(f"{where} readable image to compare the export on; give a folder of images")
    return torch.stack(images)
