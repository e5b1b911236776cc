"""Characters as few-shot classes, drawn in the typefaces that matplotlib ships: data that is always available.

A class is a character; its examples vary in typeface, weight, slant and small random distortions. They are drawn once,
into the cache, as an ordinary folder: script / character / image.
"""

import hashlib
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from headstart.errors import UserError
from headstart.files import claim_by_rename
from headstart.terminal import images_bar

# Part of the folder's name: raise it when the drawings change.
DRAWING_VERSION = 1
SIDE, EXAMPLES, FONT_SIZE = 64, 20, 44
# The script of a class, by the first word of its name in Unicode, and by block for signs.
SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "DIGIT")
SIGNS = {
    "arrows": range(0x2190, 0x2200),
    "shapes": range(0x25A0, 0x2600),
}
# Cosine similarity to a kept character, at the same size, above which one is left out as a look-alike.
LOOK_ALIKE = 0.8
COMPARED_SIDE = 24


def glyphs(cache: Path) -> Path:
    """The folder of drawings in the cache, drawn on first use."""
    typefaces = _typefaces()
    versions = f"{matplotlib.__version__} {PIL.__version__} {DRAWING_VERSION}"
    folder = cache / "glyphs" / hashlib.sha256(versions.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    try:
        with claim_by_rename(folder) as temporary:
            _draw(typefaces, temporary)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --data.cache_dir") from error
    return folder


def _typefaces() -> dict[Path, set[int]]:
    """The text typefaces and the characters of each; DejaVu and STIX have many scripts."""
    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts/ttf").glob("*.ttf"))
    wanted = [path for path in fonts if path.stem.startswith(("DejaVu", "STIXGeneral")) and "Display" not in path.stem]
    return {path: set(FT2Font(str(path)).get_charmap()) for path in wanted}


def _draw(typefaces: dict[Path, set[int]], folder: Path) -> None:
    classes = _classes(typefaces)
    fonts = {path: ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC) for path in typefaces}
    with images_bar("drawing glyphs", len(classes) * EXAMPLES) as advance:
        for script, character in classes:
            having = [font for path, font in fonts.items() if ord(character) in typefaces[path]]
            place = folder / script / f"U+{ord(character):04X}"
            place.mkdir(parents=True)
            for number, image in enumerate(_examples(character, having)):
                image.save(place / f"{number:02}.png")
            advance(EXAMPLES)


def _examples(character: str, fonts: Sequence[ImageFont.FreeTypeFont]) -> Iterator[Image.Image]:
    """Drawings in each typeface in turn, randomly rotated, slanted, stretched and shifted a little."""
    random = np.random.default_rng(ord(character))
    for font in (fonts[number % len(fonts)] for number in range(EXAMPLES)):
        angle, slant = random.uniform(-0.2, 0.2, 2)
        wide, high = random.uniform(0.9, 1.3, 2)  # scale of the sampling grid: above 1 the character shrinks
        moved = random.uniform(-4, 4, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ np.array([[1, slant], [0, 1]]) @ np.diag([wide, high])
        offset = SIDE / 2 - matrix @ (np.full(2, SIDE / 2) + moved)
        plain = _plain(character, font)
        data = (*matrix[0], offset[0], *matrix[1], offset[1])
        yield plain.transform((SIDE, SIDE), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=255)


def _plain(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws the character in black on white, centred."""
    image = Image.new("L", (SIDE, SIDE), 255)
    left, top, right, bottom = font.getbbox(character)
    place = ((SIDE - left - right) / 2, (SIDE - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, character, fill=0, font=font)
    return image


def _classes(typefaces: dict[Path, set[int]]) -> list[tuple[str, str]]:
    """(script, character), without accented letters and look-alikes."""
    reference = next(path for path in typefaces if path.stem == "DejaVuSans")
    font = ImageFont.truetype(reference, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    common = set.intersection(*(found for path, found in typefaces.items() if path.stem.startswith("DejaVu")))
    kept: list[tuple[str, str]] = []
    shapes: list[np.ndarray] = []
    for code in sorted(common):
        character = chr(code)
        script = _script(character)
        if script is None or unicodedata.normalize("NFKD", character) != character:
            continue
        shape = _shape(character, font)
        if shape is None or (shapes and (np.stack(shapes) @ shape).max() > LOOK_ALIKE):
            continue
        kept.append((script, character))
        shapes.append(shape)
    return kept


def _script(character: str) -> str | None:
    if unicodedata.category(character) in ("Lu", "Ll", "Lo", "Nd"):
        word = unicodedata.name(character, "").split(" ")[0]
        return word.lower() if word in SCRIPTS else None
    return next((name for name, block in SIGNS.items() if ord(character) in block), None)


def _shape(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """The character, cropped and resized, as a centred unit vector; None if it is blank."""
    plain = _plain(character, font)
    box = plain.point(lambda value: 255 - value).getbbox()
    if box is None:
        return None
    cut = plain.crop(box).resize((COMPARED_SIDE, COMPARED_SIDE), Image.Resampling.BILINEAR)
    ink = 255 - np.asarray(cut, dtype=np.float64).ravel()
    centred = ink - ink.mean()
    length = float(np.linalg.norm(centred))
    return centred / length if length > 0 else None
