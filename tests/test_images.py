"""Every kind of file that a folder of photos holds."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from headstart.decoding import UnreadableImage, bits_of, content_digest, decode, decode_opened, measured
from headstart.images import Preprocessing, Views, augment, preprocess

SMALL = Preprocessing(resize_size=36, crop_size=32)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)[None].repeat(size[1], 0)
    return Image.fromarray(np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 90)], 2)).convert(mode)


@pytest.mark.fault("CMYK, gray, 1 bit")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_any_mode_becomes_rgb(mode, kind):
    image = Image.fromarray(np.full((48, 64), 32896, np.uint16)) if mode == "I;16" else gradient(mode)
    assert decode(encode(image, kind), SMALL).mode == "RGB"


@pytest.mark.fault("16 bits per channel")
def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(48, 0)
    pixels = np.asarray(decode(encode(Image.fromarray(ramp)), SMALL))
    assert pixels[0, :, 0].tolist() == (ramp[0] // 257).tolist()


@pytest.mark.fault("10 to 14 bits in 16, and 32 bits")
@pytest.mark.parametrize(("largest", "bits"), [(1000, 10), (4095, 12), (4096, 14), (65535, 16), (2**20 - 1, 20)])
def test_the_scale_is_that_of_the_largest_value(largest, bits):
    ramp = np.linspace(0, largest, 64).astype(np.int32)[None].repeat(48, 0)
    data = encode(Image.fromarray(ramp), "TIFF") if largest > 65535 else encode(Image.fromarray(ramp.astype(np.uint16)))
    assert measured(data) == (largest, 64 / 48)
    assert bits_of(largest) == bits
    pixels = np.asarray(decode(data, replace(SMALL, bits=bits)))
    assert len(np.unique(pixels)) > 60
    assert pixels.max() == 255 * largest // (2**bits - 1)


def test_images_of_8_bits_and_damaged_ones_have_no_largest_value():
    deep = encode(Image.fromarray(np.full((48, 64), 4000, np.uint16)))
    assert measured(deep)[0] == 4000
    assert [measured(data)[0] for data in (b"", b"<html>", encode(gradient()), deep[:60])] == [0] * 4
    assert bits_of(0) == 16


def test_values_above_the_training_datas_become_white(capsys):
    pixels = decode(encode(Image.fromarray(np.full((48, 64), 5000, np.uint16))), replace(SMALL, bits=12))
    assert np.asarray(pixels).min() == 255
    assert "values above 4095" in capsys.readouterr().out


@pytest.mark.fault("float TIFF")
def test_floats_from_0_to_1_are_scaled():
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(48, 0)
    pixels = np.asarray(decode(encode(Image.fromarray(ramp), "TIFF"), SMALL))
    assert pixels[0, :, 0].tolist() == (ramp[0] * 255).round().tolist()


@pytest.mark.fault("float TIFF with NaN, infinity or another range")
@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "not finite"), (-np.inf, "not finite"), (255, "from 0 to 255"), (-1, "from -1 to 0")]
)
def test_other_floats_are_left_out_with_their_reason(value, reason):
    values = np.zeros((48, 64), np.float32)
    values[0, 0] = value
    with pytest.raises(UnreadableImage, match=reason):
        decode(encode(Image.fromarray(values), "TIFF"), SMALL)


@pytest.mark.fault("images of a dataset that differ only by palette, transparency or orientation")
def test_the_hash_of_a_pil_image_is_of_what_is_decoded():
    indices = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 4

    def palette(*colours: int, **info: object) -> Image.Image:
        image = Image.fromarray(indices).convert("P")
        image.putpalette([*colours, *[0] * (768 - len(colours))])
        image.info |= info
        return image

    exif = Image.Exif()
    exif[0x0112] = 3
    turned = Image.open(io.BytesIO(encode(gradient(), exif=exif)))
    plain = palette(1, 2, 3, 4, 5, 6)
    images = [plain, palette(3, 2, 1, 4, 5, 6), palette(1, 2, 3, 4, 5, 6, transparency=0), gradient(), turned]
    assert len({content_digest(image) for image in images}) == len(images)
    assert content_digest(plain) == content_digest(plain.convert("RGB"))
    assert content_digest(turned) == content_digest(gradient().rotate(180))
    assert turned.size == (64, 48)


def test_an_opened_jpeg_is_decoded_as_its_file_and_stays_as_it_was():
    data = encode(gradient(size=(1600, 1200)), "JPEG")
    image = Image.open(io.BytesIO(data))
    assert decode_opened(image, SMALL).tobytes() == decode(data, SMALL).tobytes()
    assert decode_opened(image, SMALL).size == (200, 150)
    assert np.asarray(image).shape == (1200, 1600, 3)
    assert decode_opened(image, SMALL).size == (1600, 1200)  # it is loaded now


@pytest.mark.fault("transparency")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0)).convert(mode if mode != "PA" else "RGBA")
    if mode == "PA":
        clear = clear.convert("P")
        clear.info["transparency"] = clear.getpixel((0, 0))
    assert np.asarray(decode(encode(clear), SMALL)).min() == 255


@pytest.mark.fault("CMYK, gray, 1 bit")
def test_cmyk():
    red = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert decode(encode(red, "JPEG"), SMALL).getpixel((5, 5))[0] > 200


@pytest.mark.fault("EXIF orientation")
def test_the_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encode(gradient(), "JPEG", exif=exif), SMALL)
    assert turned.size == (48, 64)


@pytest.mark.fault("animated GIF or WebP")
@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    image = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:]), SMALL)
    assert image.getpixel((5, 5))[0] > 200


def test_a_large_jpeg_is_decoded_at_a_reduced_scale():
    assert decode(encode(gradient(size=(1600, 1200)), "JPEG"), Preprocessing(resize_size=146)).size == (200, 150)


@pytest.mark.fault(
    "truncated JPEG",
    "empty file, or text in its place",
    "PNG with a wrong checksum",
    "smaller than 8 pixels on a side",
)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not here</html>", "not an image"),
        (encode(gradient(), "JPEG")[:-200], "damaged"),
        (encode(gradient())[:-30], "damaged"),
        (encode(gradient())[:60] + b"\xff" + encode(gradient())[61:], "damaged"),
        (encode(gradient(size=(7, 30))), "smaller than 8 per side"),
    ],
)
def test_what_cannot_be_read_says_why(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode(data, SMALL)


def test_too_many_pixels_name_the_option():
    with pytest.raises(UnreadableImage, match=r"--data\.max_pixels=1000"):
        decode(encode(gradient()), SMALL, max_pixels=1000)


@pytest.mark.fault("20,000 x 20,000 pixels", "90 megapixels")
@pytest.mark.parametrize("side", [20_000, 9_500])
def test_a_decompression_bomb_is_not_decoded(side):
    bomb = encode(Image.new("1", (side, side)))
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableImage, match=r"--data\.max_pixels=89478485"):
        decode(bomb, SMALL)


@pytest.mark.fault("longer than 20 times its width")
def test_a_very_long_image_stays_small():
    pixels = preprocess(decode(encode(gradient(size=(20_000, 10))), SMALL), SMALL)
    assert pixels.shape == (3, 32, 32)


def test_a_view_is_a_function_of_its_seed():
    image, state = gradient(), torch.random.get_rng_state()
    views = [augment(image, policy, SMALL, seed) for policy in ("light", "strong") for seed in (1, 2)]
    again = [augment(image, policy, SMALL, seed) for policy in ("light", "strong") for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not torch.equal(views[0], views[1])
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.fault("classes that are each other's mirror image")
@pytest.mark.parametrize("policy", ["light", "strong"])
def test_without_flips_left_stays_left(policy):
    """Red is left of green in each view, whatever is cropped; with flips in half of them."""
    image = gradient()  # its red rises to the right, and its green falls

    def flipped(flip: bool) -> int:
        views = [augment(image, policy, SMALL, seed, flip).float() for seed in range(40)]
        return sum(float(view[0, :, 20:].mean() - view[0, :, :12].mean()) < 0 for view in views)

    assert flipped(False) < 8 < flipped(True) < 32  # strong rotates too, and inverts colours
    mirrored = Views("mirrored").view(image, b"", 1, SMALL)
    assert torch.equal(mirrored, preprocess(image, SMALL).flip(-1))


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (3000, 9), (64, 64)])
def test_pad_and_squash_show_the_whole_picture(width, height):
    """Marks at the four edges are seen; a crop of a long picture cuts two off."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    margin_x, margin_y = width // 4, height // 4
    pixels[:, :margin_x], pixels[:, -margin_x:] = (255, 0, 0), (0, 0, 255)
    pixels[:margin_y, margin_x:-margin_x], pixels[-margin_y:, margin_x:-margin_x] = (0, 255, 0), (255, 255, 0)
    image, shown = Image.fromarray(pixels), {}
    for fit in ("crop", "pad", "squash"):
        seen = preprocess(image, Preprocessing().adapted(64, fit)).permute(1, 2, 0).reshape(-1, 3).int()
        colours = torch.tensor([(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0)])
        shown[fit] = [bool((seen - colour).abs().sum(dim=1).lt(30).any()) for colour in colours]
    assert all(shown["squash"])
    assert all(shown["pad"]) or min(width, height) < 10  # of 9 pixels in 3,000 nothing is left
    assert all(shown["crop"]) == (width == height)


def test_the_padding_is_the_mean_and_the_centre_the_picture():
    preprocessing = Preprocessing().adapted(64, "pad")
    assert (preprocessing.resize_size, preprocessing.crop_size) == (64, 64)
    seen = preprocess(Image.new("RGB", (200, 100), "red"), preprocessing)
    assert [int(value) for value in seen[:, 0, 0]] == [round(255 * value) for value in preprocessing.mean]
    assert (seen[:, 16:48] == torch.tensor([255, 0, 0])[:, None, None]).all()
    assert (seen[1, :16] > 0).all()
    view = augment(Image.new("RGB", (200, 100), "red"), "none", preprocessing, seed=1, flip=False)
    assert (view == seen).all()
