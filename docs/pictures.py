"""Makes what the documents show: the pictures in docs/pictures, from a run on the demo, and the notebook's outputs.

usage: python docs/pictures.py [FOLDER]    (another folder than the repository, for a look)

Needs chromium, and the packages of `pip install -e '.[dev]'`. Look at each picture before you commit it.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from rich.console import Console
from tensorboard import program

ROOT = Path(__file__).resolve().parent.parent
# A projector is drawn by WebGL, which a machine without a GPU has in software.
CHROMIUM = (
    *("chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1"),
    *("--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader"),
)
TERMINAL_WIDTH, COLOURS = 96, 128
NOTEBOOK = "examples/quickstart.ipynb"


def train(folder: Path) -> str:
    """A run on the demo below the folder; gives what the terminal showed."""
    command = [sys.executable, str(ROOT / "train.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.replace(f"{folder}/", "")


def terminal(shown: str) -> str:
    """What the terminal showed, as an SVG that asks no server for a font."""
    console = Console(record=True, width=TERMINAL_WIDTH, file=io.StringIO())
    console.print("[bold]$ python train.py[/bold]")
    console.print(shown, markup=False, highlight=False, end="")
    drawn = console.export_svg(title="headstart", unique_id="terminal")
    lines = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


def page(url: str, size: tuple[int, int], patience: int = 0) -> Image.Image:
    """The top of a page, as the browser shows it; ``patience`` are the milliseconds that its scripts have."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.png")
        window = f"--window-size={size[0]},{size[1]}", f"--virtual-time-budget={patience}"
        command = [*CHROMIUM, *(window if patience else window[:1]), f"--screenshot={file}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(file) as image:
            return image.convert("RGB")


def section(report: Path, heading: str, folder: Path) -> Path:
    """A page of one section of the report, without its heading."""
    head, body = report.read_text().split("<body>")
    parts = dict(re.findall(r"<h2>(.*?)</h2>(.*?)(?=<h2>|</body>)", body, re.DOTALL))
    alone = folder / "section.html"
    alone.write_text(f"{head}<body>{parts[heading]}</body></html>")
    return alone


def ended(image: Image.Image, gap: int = 10) -> Image.Image:
    """The image up to its last gap between two lines, so that none is cut in two."""
    rows = image.convert("L").resize((1, image.height), Image.Resampling.BOX).tobytes()
    return image.crop((0, 0, image.width, rows.rindex(b"\xff" * gap) + gap))


def trimmed(image: Image.Image, margin: int = 16) -> Image.Image:
    """The image without its white surroundings."""
    left, top, right, bottom = image.convert("L").point(lambda value: 255 * (value < 250)).getbbox()
    return image.crop((max(0, left - margin), max(0, top - margin), right + margin, bottom + margin))


def notebook(folder: Path) -> str:
    """The notebook with its outputs, which name no folder of this machine."""
    (folder / "examples").mkdir()
    (folder / "data").symlink_to(ROOT / "data")  # the demo, for which `auto` takes the bundled weights
    os.environ["HEADSTART_CACHE"] = str(folder / "notebook-cache")  # so that it begins as a reader does
    cells = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    NotebookClient(cells, resources={"metadata": {"path": str(folder / "examples")}}).execute()
    for cell in cells.cells:
        cell.metadata.pop("execution", None)  # when it ran
    text = nbformat.writes(cells) + "\n"
    for place, shown in ((ROOT / "data", "../data"), (f"{folder}/examples/", ""), (f"{folder}/", "../")):
        text = text.replace(str(place), shown)
    return text


def main(root: Path) -> None:
    """Makes all of them."""
    pictures = root / "docs/pictures"
    for target in (pictures, root / "examples"):
        target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.environ["HEADSTART_CACHE"] = str(folder / "demo-cache")
        (pictures / "terminal.svg").write_text(terminal(train(folder)))
        (root / NOTEBOOK).write_text(notebook(folder))
        (report,) = folder.glob("logs/clipart/*/report.html")
        mistakes = page(section(report, "The worst mistakes", folder).as_uri(), (1000, 2000))
        board = program.TensorBoard()
        board.configure(argv=["tensorboard", "--logdir", str(folder / "logs"), "--port", "0"])
        images = {
            "report": ended(page(report.as_uri(), (1000, 1100))),
            "mistakes": trimmed(mistakes),
            "projector": page(f"{board.launch()}#projector", (1400, 900), patience=60_000),
        }
        for title, image in images.items():
            path = pictures / f"{title}.png"
            image.quantize(COLOURS).save(path, optimize=True)
            print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
