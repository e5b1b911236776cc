"""A page to try a head on: drop a picture, and see the classes, where the head looks, and the nearest pictures."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.routing import Rule
from werkzeug.wrappers import Request, Response

from headstart.data.module import ImageData
from headstart.data.splits import Item
from headstart.deploy.predictor import Predictor
from headstart.errors import UserError
from headstart.report.page import jpeg
from headstart.report.tensorboard import thumbnails
from headstart.search.knn import nearest
from headstart.serving import LOCAL, Application, page
from headstart.terminal import one_line

NEAREST = 6
LARGEST = 20_000_000  # bytes of an upload


@dataclass(frozen=True)
class Training:
    """The training images of a head, with their features, loaded."""

    data: ImageData

    def like(self, features: Tensor) -> list[dict[str, str]]:
        """The nearest images to features [1, D]: a thumbnail and the class of each."""
        items, (matrix, *_) = self.data.items_in("train"), self.data.labelled("train").views
        _, rows = nearest(features.to(self.data.store.device), matrix, NEAREST)
        thumbnail = thumbnails(self.data.store, items)
        return [{"picture": jpeg(thumbnail(row)), "label": self._named(items[row])} for row in rows[0].tolist()]

    def _named(self, item: Item) -> str:
        return one_line(item.named(self.data.class_names))


class DemoPage(Application):
    """A WSGI application: the page below ``token``, and its API, which takes the bytes of an image.

    The API's answer is the row of `headstart predict --format=jsonl`, without the path. An upload is bounded, lies in a
    private folder while it is read, and is deleted. Maps are drawn if the predictor explains.
    """

    refused = 400
    largest = LARGEST + 1  # a body of unknown length is cut there

    def __init__(
        self, predictor: Predictor, token: str, training: Training | None, sets: bool, local: bool = True
    ) -> None:
        self._predictor, self._training, self._sets = predictor, training, sets
        rules = [Rule(f"/{token}/", endpoint=self._page, methods=["GET"])]
        rules += [
            Rule(f"/{token}/{name}", endpoint=endpoint, methods=["POST"])
            for name, endpoint in (("predict", self._predict), ("show", self._show))
        ]
        super().__init__(rules, LOCAL if local else None)

    def _page(self, request: Request) -> Response:
        module = self._predictor.module
        return page(
            "deploy/demo.html.jinja", classes=len(module.class_names), method=self._predictor.method, most=LARGEST
        )

    def _predict(self, request: Request) -> Response:
        """The API."""
        return _json(self._answer(request, maps=False)[0])

    def _show(self, request: Request) -> Response:
        """The API's answer, with the map and the nearest pictures."""
        row, features, drawn = self._answer(request, maps=True)
        if drawn:
            row["map"] = jpeg(drawn)
        if self._training:
            row["nearest"] = self._training.like(features)
        return _json(row)

    @torch.no_grad()
    def _answer(self, request: Request, maps: bool) -> tuple[dict[str, Any], Tensor, Image.Image | None]:
        """The row of `predict` for the image in the request, its features [1, D], and the picture of its map."""
        if (request.content_length or 0) > LARGEST or len(body := request.get_data(cache=False)) > LARGEST:
            raise RequestEntityTooLarge(f"the image has more than {LARGEST // 1_000_000} MB")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "upload")
            file.write_bytes(body)
            (computed,) = self._predictor.stream([str(file)])
            (prediction,) = self._predictor.predictions(computed, maps)
            drawn = self._predictor.drawn(prediction) if prediction.heat is not None else None
        if prediction.error:
            raise UserError(f"the image cannot be used: {prediction.error}")
        row = prediction.as_row(self._sets)
        del row["path"]
        return row, computed.features, drawn


def _json(row: dict[str, Any]) -> Response:
    return Response(json.dumps(row), mimetype="application/json", headers={"Cache-Control": "no-store"})
