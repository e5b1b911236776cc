import io
import os
import socket
from pathlib import Path

import pytest
from PIL import Image
from werkzeug.test import Client

from headstart import files
from headstart.cli import main
from headstart.label.answers import Answers
from headstart.label.page import LabelPage, within
from support import draw, rows_of

TOKEN = "secret"
LOCAL = "http://127.0.0.1:8000"


@pytest.fixture
def heap(tmp_path) -> Path:
    return draw(tmp_path / "heap", images=2).resolve()


@pytest.fixture
def queue(heap) -> list[Path]:
    return sorted(heap.rglob("*.png"))


class Page:
    """The page's routes, as a browser calls them."""

    def __init__(self, queue, heap, labels="labels.csv", classes=("ant", "bee")) -> None:
        self.client = Client(LabelPage(queue, heap, Answers(Path(labels)), classes, TOKEN))

    def get(self, path: str = "", **options):
        return self.client.get(f"/{TOKEN}/{path}", base_url=options.pop("base_url", LOCAL), **options)

    def post(self, number: int = 0, **form: str):
        return self.client.post(f"/{TOKEN}/", base_url=LOCAL, data={"number": number, **form})

    def shown(self) -> int | None:
        text = self.get().text
        return int(text.split('src="picture/')[1].split('"')[0]) if 'src="picture/' in text else None


def labels() -> list[tuple[str, str]]:
    return [(row["path"], row["label"]) for row in rows_of(Path("labels.csv"))]


def test_an_answer_is_on_the_disk_before_the_next_picture_is_shown(heap, queue, monkeypatch):
    flushed = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_size))
    page = Page(queue, heap)
    assert page.shown() == 0
    assert not Path("labels.csv").exists()
    answer = page.post(0, label="ant")
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/{TOKEN}/")
    assert labels() == [("heap/blue/000.png", "ant")]
    assert flushed[0] == Path("labels.csv").stat().st_size
    assert page.shown() == 1


def test_undo_skip_double_answers_and_new_classes(heap, queue):
    page = Page(queue, heap)
    page.post(0, label="ant")
    page.post(0, label="bee")  # a second click on a page from before
    page.post(1, label="wasp <b>")
    page.post(2, skip="")
    assert page.shown() == 3
    text = page.get().text
    assert "2 of 6 labelled, 1 skipped" in text
    assert 'value="wasp &lt;b&gt;" data-key="3"' in text
    assert labels() == [("heap/blue/000.png", "ant"), ("heap/blue/001.png", "wasp <b>")]
    page.post(3, undo="")
    assert page.shown() == 1
    assert labels() == [("heap/blue/000.png", "ant")]
    page.post(1, undo="")
    page.post(0, undo="")
    assert labels() == []
    for number in (0, 1, 3, 4, 5):
        page.post(number, label="ant")
    assert page.shown() is None
    assert "Nothing is left to label except skipped pictures" in page.get().text


def test_it_resumes_and_rows_that_are_there_stay_byte_for_byte(heap, queue):
    before = b'\xef\xbb\xbfgroup,label,path\na, "x y" ,./heap/blue/000.png\nb,bee,elsewhere.png'
    Path("labels.csv").write_bytes(before)
    page = Page(queue, heap)
    assert page.shown() == 1
    assert ">bee" in page.get().text
    page.post(1, undo="")  # the last row is not of this page's making
    page.post(1, label='a "b", c')
    assert Path("labels.csv").read_bytes() == before + b'\r\n,"a ""b"", c",heap/blue/001.png\r\n'
    again = Page(queue, heap)
    assert again.shown() == 2
    again.post(2, undo="")
    assert Path("labels.csv").read_bytes() == before + b"\r\n"
    assert again.shown() == 1


@pytest.mark.fault("labels.csv changed by another program during labelling")
def test_a_file_that_another_program_changed_is_left_alone(heap, queue):
    page = Page(queue, heap)
    page.post(0, label="ant")
    Path("labels.csv").write_text("path,label\nmine,cat\n")
    answer = page.post(1, label="ant")
    assert answer.status_code == 409
    assert "another program changed it" in answer.text
    assert Path("labels.csv").read_text() == "path,label\nmine,cat\n"
    assert page.shown() == 1


@pytest.mark.fault("full disk during labelling")
def test_a_full_disk_loses_nothing_and_is_told(heap, queue, monkeypatch):
    page = Page(queue, heap)
    page.post(0, label="ant")

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        answer = page.post(1, label="bee")
    assert answer.status_code == 409
    assert "No space left" in answer.text
    assert labels() == [("heap/blue/000.png", "ant")]
    assert page.shown() == 1
    assert page.post(1, label="bee").status_code == 303


def test_only_the_owner_of_the_address_gets_in(heap, queue):
    page = Page(queue, heap)
    for path in ("/", "/wrong/", "/wrong/picture/0", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/"):
        assert page.client.get(path, base_url=LOCAL).status_code == 404
        assert page.client.post(path, base_url=LOCAL, data={"number": 0, "label": "ant"}).status_code in (404, 405)
    for host in ("http://evil.example", "http://127.0.0.1.evil.example", "http://192.168.0.2:8000"):
        assert page.get(base_url=host).status_code == 400
        assert page.client.post(f"/{TOKEN}/", base_url=host, data={"number": 0, "label": "ant"}).status_code == 400
    assert page.get(base_url="http://localhost:8000").status_code == 200
    assert page.get("picture/0", base_url="http://evil.example").status_code == 400
    assert page.post(0, label="x" * 20_000).status_code == 413
    for label in ("", "  ", "a\nb", "a" * 101):
        assert page.post(0, label=label).status_code == 400
    for number in (-1, 6, "one"):
        assert page.post(number, label="ant").status_code == 400
    assert not Path("labels.csv").exists()


@pytest.mark.fault("link to a file outside the folder being labelled")
def test_only_pictures_of_the_heap_are_served_and_only_as_pixels(heap, queue, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(queue[0].read_bytes())
    (heap / "link.png").symlink_to(outside)
    (heap / "loop.png").symlink_to(heap / "loop.png")
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.new("RGB", (3000, 2000), "red").save(heap / "big.jpg", exif=exif)
    (heap / "bad.png").write_bytes(b"<script>")
    inside = [heap / "big.jpg", heap / "bad.png", heap / "link.png", heap / "loop.png", heap / "gone.png", outside]
    page = Page([*queue, *inside], heap)
    answer = page.get("picture/6")
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert b"where I live" not in answer.data
    with Image.open(io.BytesIO(answer.data)) as image:
        assert image.size == (1024, 683)
    names = [*range(7, 13), "-1", "../labels.csv", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "heap/big.jpg"]
    for name in names:
        assert page.get(f"picture/{name}").status_code == 404
    assert within(queue[0], heap)
    assert not within(heap / "../outside.png", heap)


def test_the_page_needs_no_other_site_and_lets_none_in(heap, queue):
    answer = Page(queue, heap, classes=['"><script>']).get()
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["form-action"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "//" not in answer.text.replace("  // ", "")
    assert '"><script>' not in answer.text
    assert answer.text.count("<script") == 1


def test_the_command_serves_the_queue_of_next(heap, tmp_path, monkeypatch, refused, capsys):
    (heap / "link.png").symlink_to("/etc/hostname")
    Path("next.csv").write_text("path,label\nheap/red/001.png,\nheap/link.png,\nelsewhere.png,\n")
    seen, opened = [], []

    class Server:
        port = 1234

        def __init__(self, host, port, page, threaded, request_handler, fd) -> None:
            with socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM) as listener:
                seen.append((*listener.getsockname(), page))

        def serve_forever(self) -> None:
            page = seen[-1][2]
            page._answers.add(heap / "red/001.png", "red")

    with monkeypatch.context() as patched:
        patched.setattr("headstart.serving.make_server", Server)
        patched.setattr("webbrowser.open", opened.append)
        options = f"--data.root={heap}", "--queue=next.csv", "--classes=red, blue"
        assert main(["label", *options]) == {"labelled": 1, "left": 0}
    host, _, page = seen[0]
    assert host == "127.0.0.1"
    assert opened == [f"http://127.0.0.1:1234{page._home}"]
    assert len(page._home) > 20
    said = capsys.readouterr().out
    assert "2 of 3 images are not in" in said
    assert labels() == [("heap/red/001.png", "red")]

    Path("next.csv").write_text("path\nelsewhere.png")
    assert "none of its images is in" in refused("label", f"--data.root={heap}", "--queue=next.csv")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}: cannot be used" in refused("label", f"--data.root={heap}", f"--port={port}")
    assert "--port: 70000: must be a number" in refused("label", f"--data.root={heap}", "--port=70000")
    assert "--data.root is missing" in refused("label")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has it")
def test_labels_that_cannot_be_written_are_refused_before_the_first_answer(colours, refused):
    line = refused("label", f"--data.root={colours}", "--browser=false", "--labels=/proc/labels.csv")
    assert line.startswith("error: --labels=/proc/labels.csv: cannot be written (")
