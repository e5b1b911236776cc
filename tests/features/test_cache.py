"""The cache: what is computed again and what is not, and what survives."""

import hashlib
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from headstart import TransferClassifier
from headstart.cli import main
from headstart.data.loaders import BatchOrder, FeatureLoader
from headstart.features.arithmetic import BATCH
from headstart.features.cache import FeatureCache, cache_key, chunk_size
from headstart.features.hashes import verify
from headstart.features.matrix import FeatureMatrix, Labelled, Shard
from headstart.files import write_atomically
from headstart.model.backbone import FrozenBackbone
from support import COLOURS, RESNET18, draw, features, newest_run


@pytest.fixture
def seen(monkeypatch):
    """Counts images that are extracted; the four of the spot check are no such batch."""
    counts = [0]
    forward = FrozenBackbone.forward

    def counting(self, images):
        if len(images) == BATCH:  # the last one is padded with copies of its first image
            counts[0] += len(torch.unique(images.flatten(1), dim=0))
        return forward(self, images)

    monkeypatch.setattr(FrozenBackbone, "forward", counting)

    def since() -> int:
        counted, counts[0] = counts[0], 0
        return counted

    return since


def once(train, root, *options):
    return train(root, "--trainer.max_epochs=1", "--data.num_workers=2", *options)


def test_each_image_once_cold_and_never_warm(colours, train, seen, capsys):
    once(train, colours)
    assert seen() == 60
    assert "MISS" in capsys.readouterr().out
    once(train, colours, "--data.split_seed=4", "--model.lr=0.1")
    assert seen() == 0
    assert "HIT" in capsys.readouterr().out


@pytest.mark.fault("changed bytes in an image")
def test_added_and_changed_images_are_all_that_is_computed(colours, train, seen, capsys):
    once(train, colours)
    seen()
    capsys.readouterr()
    draw(colours / "more", images=10, seed=7, colours={"red": COLOURS["red"]})
    for path in (colours / "more/red").iterdir():
        path.rename(colours / "red" / f"new-{path.name}")
    shutil.rmtree(colours / "more")
    once(train, colours)
    assert seen() == 10
    assert "PARTIAL, 10 of 70" in capsys.readouterr().out
    victim = colours / "blue/003.png"
    changed = Image.open(victim)
    changed.putpixel((5, 5), (1, 2, 3))
    changed.save(victim)
    once(train, colours)
    assert seen() == 1


def test_a_change_hidden_from_size_and_mtime_is_seen(colours, train, seen, monkeypatch):
    monkeypatch.setattr("headstart.features.hashes.GRAIN_NS", 2 * 10**8)
    once(train, colours)
    seen()
    victim = colours / "green/001.bmp"
    Image.open(colours / "green/001.png").save(victim)
    (colours / "green/001.png").unlink()
    once(train, colours)
    assert seen() == 1
    time.sleep(0.3)  # past the grain within which no stamp is trusted
    once(train, colours)
    before, content = victim.stat(), bytearray(victim.read_bytes())
    content[-1] ^= 0xFF
    victim.write_bytes(content)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert victim.stat().st_size == before.st_size
    assert victim.stat().st_mtime_ns == before.st_mtime_ns
    once(train, colours)
    assert seen() == 1


def test_relabelling_and_renaming_compute_nothing(colours, train, seen):
    once(train, colours)
    seen()
    (colours / "red").rename(colours / "crimson")
    (colours / "blue/000.png").rename(colours / "green/moved.png")
    once(train, colours)
    assert seen() == 0


@pytest.mark.parametrize("option", ["--model.image_size=64", "--model.fit=pad", "--data.max_pixels=1000000"])
def test_what_the_features_depend_on_is_in_the_key(option, colours, train, seen, capsys):
    once(train, colours)
    seen()
    capsys.readouterr()
    once(train, colours, option)
    assert seen() == 60
    assert "MISS" in (out := capsys.readouterr().out)
    assert "new: " in out
    once(train, colours)
    assert seen() == 0


def test_the_mirror_of_all_layers_is_in_the_key():
    arguments = torch.device("cpu"), torch.float32, 1000, {"policy": "none"}
    keys = [
        cache_key(FrozenBackbone(weights="random", image_size=64, layers="all", mirror=mirror), *arguments)["layers"]
        for mirror in (True, False)
    ]
    assert keys == ["all", "all, not mirrored"]


def test_features_of_another_device_have_another_key():
    backbone, arguments = FrozenBackbone("timm/test_resnet", "random", 32), (torch.float32, 1000, {"policy": "none"})
    keys = [cache_key(backbone, torch.device(name), *arguments) for name in ("cpu", "cuda:0", "cuda:1", "mps")]
    assert keys[1] == keys[2]
    assert len({str(key) for key in keys}) == 3


def test_one_batch_norm_buffer_is_in_the_key(tmp_path):
    backbone = FrozenBackbone(weights="random")
    arguments = torch.device("cpu"), torch.float32, 1000, {"policy": "none"}
    first = FeatureCache(tmp_path, cache_key(backbone, *arguments)).folder
    assert FeatureCache(tmp_path, cache_key(backbone, *arguments)).folder == first
    backbone.net.layer2[0].bn1.running_mean[3] += 1e-6
    assert FeatureCache(tmp_path, cache_key(backbone, *arguments)).folder != first


def test_views_are_kept_and_more_views_cost_only_themselves(colours, train, seen):
    trained = once(train, colours)["images"]["train"]
    seen()
    once(train, colours, "--data.views=3", "--data.augment=light")
    assert seen() == 2 * trained
    once(train, colours, "--data.views=4", "--data.augment=light")
    assert seen() == trained
    once(train, colours, "--data.views=4", "--data.augment=light")
    assert seen() == 0
    once(train, colours, "--data.views=2", "--data.augment=strong")
    assert seen() == trained
    once(train, colours, "--data.views=2", "--data.augment=light", "--data.view_seed=1")
    assert seen() == trained


def test_an_epoch_takes_its_view():
    matrices = [FeatureMatrix([shard(5, start=100 * view)], rows(5)) for view in range(3)]
    for epoch in range(7):
        loader = FeatureLoader(Labelled(matrices, torch.arange(5)), BatchOrder(5, 2, 0, lambda epoch=epoch: epoch))
        for batch, labels in loader:
            assert torch.equal(batch[:, 0], labels + 100.0 * (epoch % 3))


def rows(count: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(count)]


def shard(count: int, start: int = 0) -> Shard:
    return Shard(rows(count), torch.arange(start, start + count, dtype=torch.float32)[:, None].repeat(1, 4))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_matrix_gives_its_rows_in_order_whether_mapped_or_not(in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr("headstart.features.matrix.IN_MEMORY", 0)
    names = rows(20)
    numbers = torch.arange(20, dtype=torch.float32)[:, None].repeat(1, 4)
    shards = [Shard(names[:7], numbers[:7]), Shard([], torch.empty(0, 4)), Shard(names[7:], numbers[7:])]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    matrix = FeatureMatrix(shards, [names[i] for i in order])
    index = torch.tensor([3, 3, 19, 0, 11])
    assert matrix.gather(index)[:, 0].tolist() == [order[i] for i in index]
    assert (matrix._whole is None) != in_memory


def test_mapped_and_in_memory_training_end_at_the_same_head(colours, train, monkeypatch):
    results = []
    for limit in (2**30, 0):
        monkeypatch.setattr("headstart.features.matrix.IN_MEMORY", limit)
        results.append(once(train, colours))
    assert results[0]["val/loss"] == results[1]["val/loss"]


def test_a_shard_is_whole_in_its_file(tmp_path):
    made = Shard(rows(3), torch.rand(3, 4), {b"\x07" * 32: "damaged: ü"}, 1.5)
    (tmp_path / "a.safetensors").write_bytes(made.to_bytes())
    read = Shard.open(tmp_path / "a.safetensors")
    assert (read.rows, read.failures, read.seconds) == (made.rows, made.failures, 1.5)
    assert torch.equal(read.features, made.features)


def test_a_chunk_is_small_for_a_folder_and_large_for_a_million():
    assert [chunk_size(n) for n in (10, 2048, 60_000, 10**6)] == [64, 64, 1024, 4096]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("features/*/*.safetensors")}


def flip(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def sound(cache: Path) -> bool:
    """Whether every file of the cache is what its checksum says."""
    for path in cache.glob("features/*/*.safetensors"):
        verify(path)
    for path in cache.glob("features/*/key.json"):
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.parent.name)
    for path in cache.glob("index/*.json"):
        checksum, body = path.read_bytes().split(b"\n", 1)
        assert hashlib.sha256(body).hexdigest() == checksum.decode()
    return True


def flips(folder: Path, cache: Path, train, count: int) -> int:
    """Flips one random bit of the cache at a time; how often the next run saw it, and mended the cache."""
    once(train, folder)
    before, generator, found = features(cache), random.Random(0), 0
    for _ in range(count):
        files = sorted(path for path in cache.rglob("*") if path.suffix in (".safetensors", ".json"))
        flip(generator.choice(files), generator)
        once(train, folder)
        found += sound(cache) and features(cache) == before
    return found


def test_a_flipped_bit_is_found_and_refilled(colours, train, own_cache):
    assert flips(colours, own_cache, train, 8) == 8


@pytest.mark.slow
def test_a_thousand_flipped_bits(colours, train, own_cache, capsys):
    found = flips(colours, own_cache, train, 1000)
    with capsys.disabled():
        print(f"\nbit flips: 1000 tried, {found} found and refilled")
    assert found == 1000


@pytest.mark.fault("lock held by a process that died")
def test_a_lock_left_by_the_dead_is_taken_over(colours, train, own_cache):
    once(train, colours)
    expected = features(own_cache)
    for path in own_cache.glob("features/*/*.safetensors"):
        path.unlink()
    assert list(own_cache.glob("features/*/locks/*.lock"))
    once(train, colours)
    assert features(own_cache) == expected


@pytest.mark.fault("cache folder without permission")
def test_a_cache_that_cannot_be_written_is_said_once_and_does_without(colours, train, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way, also for root")
    result = once(train, colours, *RESNET18, f"--data.cache_dir={tmp_path / 'file'}", "--trainer.max_epochs=8")
    out = capsys.readouterr().out
    assert out.count("cannot be written") == 1
    assert result["test/acc"] == 1.0


def test_a_disk_that_fills_up_is_said_once_and_does_without(colours, train, capsys, monkeypatch):
    def full(path, data):
        if path.suffix == ".json":
            return write_atomically(path, data)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "headstart.features.cache.write_atomically", lambda path, data: path.suffix == ".json" or full(path, data)
    )
    monkeypatch.setattr("os.utime", lambda *args, **kwargs: None)
    result = once(train, colours, *RESNET18, "--trainer.max_epochs=8")
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 1
    assert "bytes" in out
    assert result["test/acc"] == 1.0


@pytest.mark.fault("features that are not finite")
def test_features_that_are_not_finite_are_refused_by_name(colours, refused, monkeypatch, own_cache):
    forward = FrozenBackbone.forward
    monkeypatch.setattr(FrozenBackbone, "forward", lambda self, images: forward(self, images) * float("nan"))
    line = refused("train", f"--data.root={colours}", "--model.image_size=32")
    assert "not finite" in line
    assert ".png" in line
    assert not content(own_cache)


def test_bf16_and_fp32_features_are_close_and_kept_apart(colours, train, seen):
    bf16 = once(train, colours, "--data.feature_precision=bf16")
    assert seen() == 60
    fp32 = once(train, colours, "--data.feature_precision=fp32")
    assert seen() == 60
    assert bf16["val/loss"] == pytest.approx(fp32["val/loss"], rel=0.05)


def test_the_rows_do_not_depend_on_their_neighbours(colours, train, own_cache):
    once(train, colours)
    all_at_once = features(own_cache)
    shutil.rmtree(own_cache)
    hidden = colours.parent / "hidden"
    hidden.mkdir()
    for path in sorted((colours / "red").iterdir())[:13]:
        path.rename(hidden / path.name)
    once(train, colours)
    for path in hidden.iterdir():
        path.rename(colours / "red" / path.name)
    once(train, colours)
    assert features(own_cache) == all_at_once


def test_the_command_lists_verifies_and_prunes(colours, train, own_cache, capsys, refused):
    once(train, colours)
    capsys.readouterr()
    assert main(["cache"])["keys"] == 1
    assert "timm" in capsys.readouterr().out
    assert main(["cache", "verify"]) == {"pieces": 1, "damaged": 0}
    flip(next(own_cache.glob("features/*/*.safetensors")), random.Random(1))
    assert main(["cache", "verify"])["damaged"] == 1
    assert main(["cache", "prune"])["pruned"] == 0
    assert main(["cache", "prune", "--days=0"])["pruned"] == 1
    assert not list(own_cache.glob("features/*"))
    for name, days in (
        ("int8/old.onnx", 40),
        ("int8/new.onnx", 20),
        ("arithmetic/old.json", 40),
        ("int8/old.lock", 40),
    ):
        path = own_cache / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12345")
        os.utime(path, (time.time() - 86_400 * days,) * 2)
    assert main(["cache"]) == {"keys": 0, "bytes": 15}
    assert "2 quantised networks in int8/" in capsys.readouterr().out
    assert main(["cache", "prune"]) == {"pruned": 0, "bytes": 10}
    left = {path.name for name in ("int8", "arithmetic") for path in (own_cache / name).iterdir()}
    assert left == {"new.onnx", "old.lock"}
    assert "--day" in refused("cache", "prune", "--day=0")


def test_predictions_of_a_checkpoint_agree_with_its_cached_features(colours, train):
    result = once(train, colours, "--data.feature_precision=fp32", "--trainer.max_epochs=4")
    model = TransferClassifier.load_from_checkpoint(newest_run() / "checkpoints/best.ckpt")
    lines = [line.split(",") for line in (newest_run() / "splits.csv").read_text().splitlines()]
    tested = [(name, path) for split, name, path, _ in lines if split == "test"]
    right = 0
    for name, path in tested:
        with Image.open(colours / path) as image:
            right += model.class_names[int(model.predict(image).argmax())] == name
    assert right / len(tested) == pytest.approx(result["test/acc"])


def test_bf16_rows_are_compared_with_bf16(colours, train, capsys, monkeypatch):
    """Some networks differ from fp32 by more than another image's row may."""
    options = ["--trainer.max_epochs=1", "--data.feature_precision=bf16"]
    train(colours, *options)
    monkeypatch.setattr("headstart.features.cache.PROBE_TOLERANCE", 1e-3)
    capsys.readouterr()
    train(colours, *options)
    shown = capsys.readouterr().out
    assert "HIT" in shown
    assert "computed again" not in shown
