"""The page to try a head on: the same answers as `predict`, and nothing that harms."""

import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from werkzeug.test import Client

from headstart.cli import main
from headstart.deploy.demo import LARGEST, DemoPage, Training
from headstart.deploy.predictor import Answers
from headstart.model.classifier import TransferClassifier
from headstart.verbs.demo import predictor_of, training_of

TOKEN, LOCAL = "secret", "http://127.0.0.1:8000"


@pytest.fixture
def client(checkpoint):
    """The page's client, with the nearest pictures, and sets of classes."""
    module = TransferClassifier.load_from_checkpoint(checkpoint).eval()
    data = training_of(module, checkpoint, "cpu")
    assert data
    predictor = predictor_of(module, Answers(module), SimpleNamespace(accelerator="cpu", top_k=5))
    return Client(DemoPage(predictor, TOKEN, Training(data), sets=False))


def post(client, data: bytes, name: str = "predict", base_url: str = LOCAL):
    return client.post(f"/{TOKEN}/{name}", base_url=base_url, data=data)


def test_the_api_answers_as_predict_does(client, checkpoint, trained, tmp_path):
    paths = sorted((trained / "colours").rglob("*.png"))[:60:3]
    assert len(paths) == 20
    main(["predict", f"--ckpt_path={checkpoint}", "--output=rows.jsonl", *map(str, paths)])
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    for row in rows:
        answer = post(client, Path(row.pop("path")).read_bytes())
        assert answer.json == row  # to the bit


def test_the_page_shows_the_map_and_the_nearest_pictures(client, trained, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    row = post(client, (trained / "colours/red/000.png").read_bytes(), "show").json
    assert row["label"] == "red"
    assert row["map"].startswith("data:image/jpeg;base64,")
    assert len(row["nearest"]) == 6
    assert {near["label"] for near in row["nearest"]} == {"red"}
    assert not list((tmp_path / "temporary").iterdir())
    page = client.get(f"/{TOKEN}/", base_url=LOCAL)
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["Content-Security-Policy"]
    assert "//" not in page.text.split("<style")[1].replace("// ", "")  # no address of another site


def bomb() -> bytes:
    """A small PNG that claims 50,000 x 50,000 pixels."""
    picture = io.BytesIO()
    Image.new("1", (8, 8)).save(picture, "PNG")
    data = bytearray(picture.getvalue())
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.fault("upload to the demo that is too large, text or a decompression bomb")
def test_what_is_no_picture_is_refused_in_one_line(client):
    for data, said in ((b"just a text\n", "cannot be used"), (bomb(), "pixels"), (b"", "cannot be used")):
        answer = post(client, data)
        assert answer.status_code == 400
        assert said in answer.text
        assert len(answer.text.splitlines()) == 1
    claimed = {"CONTENT_LENGTH": "100000000"}  # refused before it is read
    huge = client.post(f"/{TOKEN}/predict", base_url=LOCAL, environ_overrides=claimed)
    unknown = {"wsgi.input": io.BytesIO(bytes(LARGEST + 1000)), "wsgi.input_terminated": True}  # sent in chunks
    chunked = client.post(f"/{TOKEN}/predict", base_url=LOCAL, environ_overrides=unknown)
    for answer in (huge, chunked, post(client, bytes(LARGEST + 1))):
        assert answer.status_code == 413
        assert answer.text == "the image has more than 20 MB\n"


def test_other_names_and_addresses_are_refused(client, trained):
    picture = (trained / "colours/red/000.png").read_bytes()
    assert post(client, picture, base_url="http://evil.example:8000").status_code == 400
    assert client.get("/", base_url=LOCAL).status_code == 404
    assert client.post("/other/predict", base_url=LOCAL, data=picture).status_code == 404
    assert client.get(f"/{TOKEN}/predict", base_url=LOCAL).status_code == 405


def test_the_command_says_where_it_listens(checkpoint, monkeypatch, capsys, refused):
    class Server:
        port = 1234

        def __init__(self, *arguments, **options) -> None:
            pass

        def serve_forever(self) -> None:
            pass

    with monkeypatch.context() as patched:
        patched.setattr("headstart.serving.make_server", Server)
        main(["demo", f"--ckpt_path={checkpoint}"])
        said = capsys.readouterr().out
        assert "page:     http://127.0.0.1:1234/" in said
        assert "/predict" in said
        assert "WARNING" not in said
        assert said.endswith("demo:     ended\n")
        main(["demo", f"--ckpt_path={checkpoint}", "--host=0.0.0.0"])
        assert "WARNING: anyone who can reach 0.0.0.0" in capsys.readouterr().out
    assert "cannot be used on no.such.host.invalid" in refused(
        "demo", f"--ckpt_path={checkpoint}", "--host=no.such.host.invalid"
    )


def test_without_the_run_there_are_no_nearest_pictures(checkpoint, tmp_path, capsys):
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(checkpoint.read_bytes())
    assert training_of(TransferClassifier.load_from_checkpoint(alone), alone, "cpu") is None
    assert "without the nearest training pictures" in capsys.readouterr().out
