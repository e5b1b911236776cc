"""The `demo` command: a page on this machine to try a head on."""

import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from headstart.data.module import ImageData
from headstart.data.sources import chosen_source
from headstart.data.splits import repeated
from headstart.data.store import STORE_OPTIONS
from headstart.deploy.predictor import Answers, Predictor
from headstart.device import device_of
from headstart.errors import UserError
from headstart.features.arithmetic import as_trained, chosen
from headstart.features.hashes import cache_folder
from headstart.features.stream import FileStream
from headstart.model.classifier import TransferClassifier
from headstart.parser import OptionParser, add_accelerator, add_answers, add_checkpoint, parser_of, required
from headstart.ranges import Port
from headstart.runs.history import Run
from headstart.terminal import quiet_libraries, say

THIS_MACHINE = ("127.0.0.1", "localhost")


def demo(options: Sequence[str]) -> None:
    """Serves the page until Ctrl-C."""
    quiet_libraries()
    given = _parser().parse_args(list(options))
    required(given, "--ckpt_path")
    if not given.host:
        raise UserError("--host is empty; give 127.0.0.1, or 0.0.0.0 for everybody who can reach this machine")
    try:
        from headstart.deploy.demo import DemoPage, Training
        from headstart.serving import serve
    except ImportError as error:
        raise UserError("demo: needs werkzeug: pip install -e '.[demo]'") from error
    checkpoint, token = Path(given.ckpt_path).expanduser(), secrets.token_urlsafe(16)
    module = TransferClassifier.load_from_checkpoint(checkpoint).eval()
    answers = Answers(module, given.unknown, given.coverage, given.min_probability)
    predictor, data = predictor_of(module, answers, given), training_of(module, checkpoint, given.accelerator)
    local = given.host in THIS_MACHINE
    page = DemoPage(predictor, token, Training(data) if data else None, given.coverage is not None, local)

    def started(address: str) -> None:
        if not local:
            say(f"demo:     WARNING: anyone who can reach {given.host} and has the address can send pictures here")
        say(f"page:     {address}/{token}/    (Ctrl-C ends)")
        say(f"API:      curl --data-binary @photo.jpg {address}/{token}/predict")

    serve(page, given.host, given.port, started)
    say("demo:     ended")


def predictor_of(module: TransferClassifier, answers: Answers, given: Any) -> Predictor:
    """The predictor of `predict`, with maps if possible."""
    device = device_of(given.accelerator)
    arithmetic = chosen(as_trained("auto", module.arithmetic, device), module.backbone, device, 0, cache_folder())
    stream = FileStream(module.backbone, device, arithmetic)
    try:
        return Predictor(module, stream, given.top_k, True, answers)
    except UserError as error:
        int8 = "there are none of int8 features"
        say(f"demo:     without maps: {int8 if arithmetic == 'int8' else str(error).removeprefix('--explain: ')}")
        return Predictor(module, stream, given.top_k, False, answers)


def training_of(module: TransferClassifier, checkpoint: Path, accelerator: str) -> ImageData | None:
    """The training images of the head's run; None, with a message, if they are missing."""
    run = Run.of(checkpoint)
    try:
        if not run.data or not run.splits_file.is_file() or module.finetuned:
            raise UserError("the head is not in the folder of a run, or its backbone was fine-tuned")
        source = chosen_source(run.data)
        options = {name: run.data[name] for name in STORE_OPTIONS if run.data.get(name) is not None}
        data = ImageData(source, **options)
        data.repeat = partial(repeated, file=run.splits_file, only=("train",))
        data.load(module.backbone, device_of(accelerator))
    except UserError as error:
        say(f"demo:     without the nearest training pictures: {error}")
        return None
    return data


def _parser() -> OptionParser:
    parser = parser_of("demo")
    add_checkpoint(parser)
    parser.add_argument("--port", type=Port, default=0, help="port to listen on; 0: a free one")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines connect"
    )
    add_answers(parser)
    add_accelerator(parser)
    return parser
