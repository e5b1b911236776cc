"""What holds for any input: of the split, of the cache's key, of the command line, of the decoder."""

import contextlib
import hashlib
import io
import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from headstart.cli import VERBS, main
from headstart.data.splits import Item, assign
from headstart.decoding import UnreadableImage, decode
from headstart.features.cache import cache_key
from headstart.images import Preprocessing
from headstart.model.backbone import FrozenBackbone
from support import at_most

CLASSES = ["a", "b", "c"]
calm = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def items(numbers: list[int], label: int = 0) -> list[Item]:
    return [Item(f"{number}.png", label, hashlib.sha256(f"{label} {number}".encode()).digest()) for number in numbers]


def places(found: list[Item]) -> dict[bytes, str | None]:
    return {item.digest: item.split for item in found}


@calm
@given(
    numbers=st.lists(st.integers(0, 10_000), min_size=60, max_size=150, unique=True),
    more=st.lists(st.integers(10_001, 20_000), max_size=50, unique=True),
    seed=st.integers(0, 10**6),
    order=st.randoms(use_true_random=False),
)
def test_the_split_is_a_function_of_content_and_new_images_move_none(numbers, more, seed, order):
    before = places(assign(items(numbers), ["a"], 0.3, 0.3, seed))
    shuffled = items(numbers + more)
    order.shuffle(shuffled)
    after = places(assign(shuffled, ["a"], 0.3, 0.3, seed))
    assert {digest: after[digest] for digest in before} == before
    assert set(before.values()) == {"train", "val", "test"}


@calm
@given(
    sizes=st.lists(st.integers(3, 40), min_size=3, max_size=3),
    copies=st.integers(1, 3),
    val=st.floats(0.05, 0.4),
    test=st.floats(0.0, 0.4),
    seed=st.integers(0, 1000),
)
def test_every_class_is_in_every_split_and_copies_stay_together(sizes, copies, val, test, seed):
    given_items = [item for label, size in enumerate(sizes) for item in items(list(range(size)), label) * copies]
    found = assign(given_items, CLASSES, val, test, seed)
    needed = {"train", "val"} | ({"test"} if test > 0 else set())
    for label in range(3):
        assert {item.split for item in found if item.label == label} == needed
    together: dict[bytes, set[str | None]] = {}
    for item in found:
        together.setdefault(item.digest, set()).add(item.split)
    assert all(len(splits) == 1 for splits in together.values())


@pytest.fixture(scope="module")
def backbones() -> dict[tuple[str, int], FrozenBackbone]:
    return {
        (weights, size): FrozenBackbone("resnet18", weights, size)
        for weights in ("bundled", "random")
        for size in (32, 64)
    }


KEYS = st.tuples(
    st.sampled_from(["bundled", "random"]),
    st.sampled_from([32, 64]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 10**9),
    st.sampled_from(["none", "light", "strong"]),
    st.integers(0, 10**6),
)


@calm
@given(first=KEYS, second=KEYS)
def test_keys_are_equal_only_where_everything_is(backbones, first, second):
    def key(weights, size, dtype, pixels, policy, seed):
        views = {"policy": policy, "seed": seed}
        return cache_key(backbones[weights, size], torch.device("cpu"), dtype, pixels, views)

    assert (key(*first) == key(*second)) == (first == second)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
VALUES = st.one_of(WORDS, st.integers().map(str), st.floats().map(str), st.sampled_from(["null", "[]", "{}", "true"]))
NAMES = (
    *("--data.root", "--model.lr", "--data.batch_size", "--trainer.max_epochs", "--model.image_size", "--ckpt_path"),
    *("--config", "--data.views", "--head", "--k_shot", "--top_k", "--output", "--model.weights", "--nonsense"),
)
OPTIONS = st.sampled_from(NAMES)


@settings(calm, max_examples=120)
@example(verb="cache", options=[("--data.root", "\n")])
@example(verb="train", options=[("--data.root", "\x1b[2J\u2028")])
@given(
    verb=st.sampled_from(sorted(VERBS)),
    options=st.lists(st.tuples(OPTIONS, VALUES), min_size=1, max_size=3),
)
def test_any_command_line_ends_in_one_line(verb, options):
    """All lack a folder that exists, or have an option that does not; none may end in a traceback."""
    arguments = [verb, *(f"{name}={value}" for name, value in options), "--data.root=/nowhere", "--nothing=1"]
    errors = io.StringIO()
    redirected = contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO())
    with redirected[0], redirected[1], pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert errors.getvalue().startswith("error: ")
    assert len(errors.getvalue().rstrip("\n").split("\n")) == 1


def damaged(generator: random.Random, originals: list[bytes]) -> bytes:
    """An image file with bytes changed, cut off, doubled or put in."""
    data = bytearray(generator.choice(originals))
    for _ in range(generator.randint(1, 8)):
        place = generator.randrange(len(data)) if data else 0
        match generator.randrange(4):
            case 0:
                data[place : place + 1] = bytes([generator.randrange(256)])
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[: generator.randint(1, 64)]
            case 3:
                data[place:place] = generator.randbytes(generator.randint(1, 16))
    return bytes(data)


def fuzz(inputs: int, seed: int) -> dict[str, int]:
    generator = random.Random(seed)
    originals = []
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA"):
        file = io.BytesIO()
        Image.effect_mandelbrot((40, 32), (-2, -1, 1, 1), 20).convert("RGB").save(file, form)
        originals.append(file.getvalue())
    counts = {"read": 0, "left out": 0}
    for _ in range(inputs):
        with at_most(30):
            try:
                image = decode(damaged(generator, originals), Preprocessing(), max_pixels=1_000_000)
                assert image.mode == "RGB"
                counts["read"] += 1
            except UnreadableImage:
                counts["left out"] += 1
    return counts


def test_damaged_bytes_are_read_or_left_out():
    counts = fuzz(2_000, seed=0)
    assert min(counts.values()) > 100


@pytest.mark.slow
def test_many_damaged_bytes_are_read_or_left_out():
    counts = fuzz(50_000, seed=1)
    print(f"\nfuzz: {sum(counts.values())} inputs, {counts}, 0 crashes, 0 hangs")
