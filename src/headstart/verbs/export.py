"""The `export` command: writes a trained head and its backbone to one file that does not need headstart."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.data import folders
from headstart.data.sources import Source, chosen_source
from headstart.data.splits import Item, repeated
from headstart.decoding import MAX_PIXELS, UnreadableImage, decode
from headstart.deploy.check import check_files
from headstart.deploy.int8 import compared, loses_too_much
from headstart.deploy.onnx import Exported, run_onnx, to_int8_onnx, to_onnx
from headstart.deploy.program import run_program, to_program
from headstart.deploy.torchvision import run_torchvision, to_torchvision
from headstart.errors import UserError
from headstart.features.arithmetic import BATCH, missing_for_int8
from headstart.features.hashes import cache_folder
from headstart.features.int8 import Int8Backbone
from headstart.files import claim_by_rename, new_path, read_regular, write_new
from headstart.images import Preprocessing, preprocess
from headstart.model.classifier import TransferClassifier
from headstart.parser import add_checkpoint, parser_of, required
from headstart.report.evaluation import evenly_spaced
from headstart.runs.history import Run
from headstart.terminal import quiet_libraries, say

# Maximum difference of the exported model's probabilities from those of the fp32 model.
TOLERANCE = 1e-4
MAX_COMPARED = 32
INT8 = ".int8.onnx"
MAKERS = {
    ".onnx": (to_onnx, run_onnx),
    ".pth": (to_torchvision, run_torchvision),
    ".pt2": (to_program, run_program),
}


def export(options: Sequence[str]) -> dict[str, Any]:
    """Writes a model file if its probabilities on real images match the checkpoint's.

    A file in int8 is written if it loses almost no accuracy on all validation images.
    Next to it goes a folder of five pictures with their expected probabilities.

    Returns the `output`, the number of `images` compared, and the largest `difference` of a probability, or for int8
    the accuracy of both: `fp32/acc` and `int8/acc`.
    """
    quiet_libraries()
    parser = parser_of("export")
    add_checkpoint(parser)
    parser.add_argument(
        "--output", type=str | None, help="new .onnx, .int8.onnx or .pt2 file, or .pth for torchvision's own model"
    )
    parser.add_argument("--data.root", type=str | None, help="images to compare on; None: those of the head's run")
    given = parser.parse_args(list(options))
    required(given, "--ckpt_path", "--output")
    checkpoint, output = Path(given.ckpt_path).expanduser(), new_path("--output", given.output)
    pictures = new_path("--output", f"{output}.check")
    if output.suffix not in MAKERS:
        raise UserError(f"--output={output}: name it {' or '.join(f'*{suffix}' for suffix in (*MAKERS, INT8))}")
    if output.suffix == ".onnx" and (lacking := missing_for_int8()):
        raise UserError(f"--output={output}: needs {', '.join(lacking)}: pip install -e '.[export]'")
    module = TransferClassifier.load_from_checkpoint(checkpoint).eval()
    if output.name.endswith(INT8) and module.hparams["multilabel"]:
        raise UserError(f"--output={output}: int8 is checked by accuracy, of one label per image; export .onnx")
    with torch.no_grad():
        make = _in_int8 if output.name.endswith(INT8) else _exact
        data, about = make(module, output, given.data.root, checkpoint)
        run = partial(run_onnx, data, module) if make is _in_int8 else Exported(module)
        with claim_by_rename(pictures) as folder:
            for name, content in check_files(module, run).items():
                (folder / name).write_bytes(content)
    write_new("--output", output, data)
    say(f"check:   {pictures}, five pictures with their expected probabilities")
    say("next:    docs/deploy.md shows how to run and check it without headstart")
    return {"output": str(output)} | about


def _exact(
    module: TransferClassifier, output: Path, root: str | None, checkpoint: Path
) -> tuple[bytes, dict[str, float]]:
    """The file with the head's exact probabilities."""
    images = _real_images(module, root, checkpoint)
    make, run = MAKERS[output.suffix]
    data = make(module)
    difference = float((run(data, module, images) - Exported(module)(images)).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(f"--output={output}: its probabilities differ by {difference:.1e} from the head's; not written")
    say(f"export:  {output}, {len(data) / 1e6:.1f} MB; on {len(images)} images within {difference:.1e} of the head")
    return data, {"images": len(images), "difference": difference}


def _in_int8(
    module: TransferClassifier, output: Path, root: str | None, checkpoint: Path
) -> tuple[bytes, dict[str, float]]:
    """The file in int8, compared with the one in fp32 on the validation images."""
    batches = _validation(module, root, checkpoint)
    data = to_int8_onnx(module, Int8Backbone(module.backbone, cache_folder()).model)
    fp32, int8 = compared(to_onnx(module), data, batches)
    for name, trial in (("fp32", fp32), ("int8", int8)):
        say(f"{name}:    {trial} on {trial.images} images")
    if loses_too_much(fp32, int8):
        raise UserError(f"--output={output}: int8 loses {fp32.right - int8.right} of {fp32.images} images; not written")
    say(f"export:  {output}")
    return data, {"images": fp32.images, "fp32/acc": fp32.acc, "int8/acc": int8.acc}


def _validation(module: TransferClassifier, root: str | None, checkpoint: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the given images, or of the validation images of the head's run, with their labels."""
    run = Run.of(checkpoint)
    where: dict[str, Any] = {"root": root} if root else run.data
    if not where:
        raise UserError("--data.root is missing: the head's run has no images; give a folder of class folders")
    source = chosen_source(where)
    if source.class_names != module.class_names:
        raise UserError(f"{source.path}: its classes are not those of the head; give --data.root with the same folders")
    items = source.scan(None)[0]
    if not root:
        items = repeated(items, source.class_names, run.splits_file, only=("val",))
    if not items:
        raise UserError("--data.root is missing: the head's run has no validation image; give a folder of images")
    return _batches(items, source, module.backbone.preprocessing)


def _batches(items: Sequence[Item], source: Source, preprocessing: Preprocessing) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(items), BATCH):
        images, labels = list[Tensor](), list[int]()
        for item in items[start : start + BATCH]:
            with suppress(UnreadableImage):
                images.append(preprocess(source.read(item, preprocessing, MAX_PIXELS), preprocessing))
                labels.append(item.label)
        if images:
            yield torch.stack(images), torch.tensor(labels)


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
