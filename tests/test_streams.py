"""Standard streams, permissions, and what another hand changed in a run's folder or in the cache."""

import hashlib
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from headstart.cli import main
from headstart.data import splits
from headstart.data.splits import Item
from headstart.model.classifier import TransferClassifier
from headstart.terminal import say_all
from support import newest_run, without_roots_rights

SMALL = ["--model.image_size=32", "--report=false", "--trainer.max_epochs=1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@pytest.fixture
def work(trained, tmp_path) -> Path:
    """The folder of a run, as `checkpoint`, with images that a test may change."""
    for name in ("logs", "cache", "colours"):
        shutil.copytree(trained / name, tmp_path / name)
    return next(tmp_path.glob("logs/*/*"))


def typed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """The bytes as the standard input, strict as a terminal's."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="strict"))


@pytest.mark.wing("deploy")
@pytest.mark.fault("NUL or bytes that are not UTF-8 in a list of paths")
def test_any_bytes_may_come_on_the_standard_input(checkpoint, trained, monkeypatch):
    photos = trained / "colours"
    odd = Path(os.fsdecode(b"caf\xe9.png"))
    shutil.copy(photos / "red/000.png", odd)
    typed(monkeypatch, b"caf\xe9.png\n\n\xff\xfe\na\0b.png\n" + os.fsencode(photos / "red/001.png"))
    assert main(["predict", f"--ckpt_path={checkpoint}", "--output=rows.csv"]) == {"predicted": 2, "errors": 2}
    rows = Path("rows.csv").read_bytes().splitlines()
    assert rows[1].startswith(b"caf\xe9.png,red,")
    assert rows[2].endswith(b"no such file or directory")
    assert rows[3].endswith(b"a nul byte in its name")


@pytest.mark.fault("NUL or bytes that are not UTF-8 in a list of paths")
def test_a_nul_in_a_table_leaves_the_image_out(colours, train, capsys):
    lines = [f"colours/{name}/{number:03}.png,{name}" for name in ("red", "blue") for number in range(20)]
    Path("list.csv").write_text("\n".join(["path,label", *lines, "colours/r\0ed/000.png,red"]))
    if sys.version_info < (3, 11):
        pytest.skip("csv refuses the file")
    result = main(["train", "--data.csv=list.csv", *SMALL])
    assert result["skipped"] == 1
    assert "unreadable: embedded null byte" in capsys.readouterr().out


@pytest.mark.wing("deploy")
@pytest.mark.fault("nothing on standard input")
@pytest.mark.parametrize("data", [b"", b"\n \n", None])
def test_an_empty_list_is_refused_before_a_file_is_made(data, checkpoint, refused, monkeypatch):
    if data is None:  # `<&-`
        monkeypatch.setattr(sys, "stdin", None)
    else:
        typed(monkeypatch, data)
    line = refused("predict", f"--ckpt_path={checkpoint}", "--output=rows.csv")
    assert "no path on the standard input" in line
    assert not Path("rows.csv").exists()
    if data is None:
        sys.stdin.close()


@pytest.mark.wing("deploy")
def test_an_unknown_format_leaves_no_file(checkpoint, trained, refused):
    line = refused("predict", f"--ckpt_path={checkpoint}", str(trained), "--output=rows.csv", "--format=xml")
    assert "--format: xml: is not one of Literal['csv', 'jsonl']" in line
    assert not Path("rows.csv").exists()


@pytest.mark.wing("deploy")
def test_an_export_without_images_says_what_is_missing(checkpoint, trained, refused, tmp_path):
    lone = Path("lone/a/head.ckpt")
    lone.parent.mkdir(parents=True)
    shutil.copy(checkpoint, lone)
    Path("empty").mkdir()
    line = refused("export", f"--ckpt_path={lone}", "--output=a.pth")
    assert "--data.root is missing: the head's run has no readable image" in line
    line = refused("export", f"--ckpt_path={lone}", "--output=a.pth", "--data.root=empty")
    assert "--data.root=empty: no readable image" in line


@pytest.mark.fault("class folder whose name is not UTF-8")
def test_a_class_may_have_any_bytes_for_its_name(colours, train, monkeypatch):
    """With an output that takes UTF-8 alone, as in a terminal, and one that takes ASCII."""
    (colours / "red").rename(colours / os.fsdecode(b"caf\xe9"))
    (colours / "green").rename(colours / "\x1b[31mgr\n")
    for encoding in ("utf-8", "ascii"):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            train(colours, "--trainer.max_epochs=2", f"--report={str(encoding == 'utf-8').lower()}")
            best = newest_run() / "checkpoints/best.ckpt"
            main(["evaluate", f"--ckpt_path={best}", "--report=false"])
            main(["predict", f"--ckpt_path={best}", str(colours)])  # wing: deploy
        said = out.buffer.getvalue()
        assert b"caf\\udce9" in said  # in the table
        assert b"caf\xe9," in said  # in the rows  # wing: deploy
        assert b"\x1b[31m" not in said.split(b"path,label")[0]


def test_a_root_that_no_configuration_could_hold_is_refused(colours, refused):
    odd = colours.rename(os.fsdecode(b"caf\xe9"))
    assert "caf\\udce9: not UTF-8" in refused("train", f"--data.root={odd}", *SMALL)
    assert not Path("logs").exists()


@linux
@pytest.mark.fault("file or folder named by an option, without permission")
def test_options_that_may_not_be_read_or_written_are_named(work, refused):
    for name in ("closed", "full"):
        Path(name).mkdir()
    for name in ("w.pth", "closed/w.pth"):
        Path(name).touch()
    Path("w.pth").chmod(0)
    Path("closed").chmod(0)
    Path("full").chmod(0o500)
    best = work / "checkpoints/best.ckpt"  # wing: deploy
    data = "--data.root=colours"
    with without_roots_rights():
        for weights in ("w.pth", "closed/w.pth"):
            line = refused("train", data, *SMALL, f"--model.weights={weights}")
            assert f"{weights}: " in line
            assert "Permission denied" in line
        for option in ("--config=closed/a.yaml", "--data.splits=closed/a.csv"):
            assert "closed/a" in refused("train", data, *SMALL, option)
        assert "closed/a.ckpt: Permission denied" in refused("evaluate", "--ckpt_path=closed/a.ckpt")
        # wing: deploy
        image = "colours/red/000.png"
        for folder in ("full", "full/maps"):
            line = refused("predict", f"--ckpt_path={best}", image, "--output=rows.csv", f"--explain={folder}")
            assert f"--explain={folder}: cannot be written (Permission denied)" in line
        assert not Path("rows.csv").exists()
        counts = main(["predict", f"--ckpt_path={best}", image, "closed/x.png", "--output=rows.csv"])
        assert counts == {"predicted": 1, "errors": 1}
        # /wing
    Path("closed").chmod(0o700)


@linux
@pytest.mark.fault("cache folder without permission")
@pytest.mark.parametrize("place", ["cache", "cache/features", "cache/index", "cache/features/*"])
def test_a_cache_that_may_not_be_read_is_said(place, work, train, refused, capsys):
    (folder,) = Path().glob(place)
    folder.chmod(0)
    with without_roots_rights():
        assert train(Path("colours"), "--trainer.max_epochs=1")["test/acc"] > 0
        if place != "cache/index":  # the hashes alone
            assert capsys.readouterr().out.count("computed for this run only") == 1
            for action in ("list", "verify", "prune"):
                assert "Permission denied" in refused("cache", action, "--days=0")
        folder.chmod(0o500)
        assert main(["cache", "prune", "--days=0"])["pruned"] == 1
    folder.chmod(0o700)


@linux
def test_features_that_may_not_be_deleted_are_said(work, capsys):
    (folder,) = Path().glob("cache/features/*")
    folder.chmod(0o500)
    with without_roots_rights():
        main(["cache", "prune", "--days=0"])
    folder.chmod(0o700)
    out = capsys.readouterr().out
    assert "could not be deleted completely" in out
    assert "freed 0.0 MB" in out


@pytest.mark.fault("run folder deleted during the run")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in one
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_validation_epoch_end", "on_fit_end", "on_test_end"])
def test_a_run_folder_that_is_deleted_is_not_made_anew(hook, colours, refused, monkeypatch):
    real = getattr(TransferClassifier, hook)

    def deleting(self: TransferClassifier) -> None:
        real(self)
        shutil.rmtree("logs", ignore_errors=True)

    monkeypatch.setattr(TransferClassifier, hook, deleting)
    line = refused("train", f"--data.root={colours}", *SMALL[:2], "--trainer.max_epochs=3")
    assert str(Path("logs/colours").resolve()) in line
    assert not list(Path().glob("logs/**/*.json"))


@pytest.mark.fault("configuration of a run that was changed by hand")
@pytest.mark.parametrize(
    "content", ["data: 3", "data: {}", "data: {foo: 1}", "data: {root: 3}", 'data: {root: "a\\0b"}', "- 1", ""]
)
def test_a_run_whose_configuration_names_no_data(content, work, refused, capsys):
    (work / "config.yaml").write_text(content)
    best = work / "checkpoints/best.ckpt"
    assert "--data.root is missing" in refused("evaluate", f"--ckpt_path={best}")
    assert "--data.root is missing" in refused("export", f"--ckpt_path={best}", "--output=a.pth")  # wing: deploy
    assert "--data.root" in refused("finetune", f"--ckpt_path={best}")  # wing: finetune
    assert len(main(["runs"])) == 1


@pytest.mark.fault("splits.csv with other columns")
@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"", b"\0\0", b"\xff\xfe", b"split,path\ntrain,x\n"])
def test_splits_of_another_form_are_refused(content, work, refused):
    (work / "splits.csv").write_bytes(content)
    best = work / "checkpoints/best.ckpt"
    assert "splits.csv: lacks" in refused("evaluate", f"--ckpt_path={best}")
    assert "splits.csv: lacks" in refused("finetune", f"--ckpt_path={best}")  # wing: finetune


@pytest.mark.fault("cache with invalid files")
def test_an_index_of_another_form_is_made_anew(work, train):
    shutil.rmtree("cache/index")
    train(Path("colours"), "--trainer.fast_dev_run=true")
    (index,) = Path("cache/index").iterdir()
    _, body = index.read_bytes().split(b"\n", 1)
    known = safetensors.numpy.load(body)
    forms = [b"", b"{}", b"3", body[:-1], body[8:]]
    forms += [safetensors.numpy.save(known | {name: known[name][:-1]}) for name in known]
    forms += [safetensors.numpy.save(known | {name: known[name].astype("f4")}) for name in known if name != "names"]
    forms += [safetensors.numpy.save({name: known[name] for name in known if name != left}) for left in known]
    for form in forms:
        index.write_bytes(hashlib.sha256(form).hexdigest().encode() + b"\n" + form)
        train(Path("colours"), "--trainer.fast_dev_run=true")
        found = safetensors.numpy.load(index.read_bytes().split(b"\n", 1)[1])
        assert found.keys() == known.keys()
        assert all(np.array_equal(found[name], known[name]) for name in ("names", "digests", "measures"))


@pytest.mark.fault("cache with invalid files")
@pytest.mark.parametrize("content", ["3", "[]", "{}", '{"backbone": 3, "weights": 3}', "null", "\xff"])
def test_a_key_of_another_form_is_damaged(content, work, train, capsys):
    (key,) = Path("cache").glob("features/*/key.json")
    key.write_bytes(content.encode("latin-1"))
    assert main(["cache"]) == {"keys": 1, "bytes": 0}
    assert "damaged; `headstart cache verify` repairs it" in capsys.readouterr().out
    train(Path("colours"), "--trainer.fast_dev_run=true", "--model.image_size=64")  # another key beside it
    train(Path("colours"), "--trainer.fast_dev_run=true")
    assert "HIT" in capsys.readouterr().out
    assert main(["cache"])["bytes"] > 0


ROWS, META = torch.zeros(60, 32, dtype=torch.uint8), {"failures": "{}", "seconds": "0"}


@pytest.mark.fault("cache with invalid files")
@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"features": torch.zeros(60, 512), "rows": ROWS}, None),
        ({"features": torch.zeros(60, 512)}, META),
        ({"features": torch.zeros(60, 512), "rows": torch.zeros(60)}, META),
        ({"features": torch.zeros(60, 512), "rows": torch.tensor(3)}, META),
        ({"features": torch.zeros(3, 512), "rows": ROWS}, META),
        ({"features": torch.zeros(60, 512), "rows": ROWS}, META | {"failures": "[]"}),
        ({"features": torch.zeros(60, 512), "rows": ROWS}, META | {"seconds": "soon"}),
    ],
)
def test_a_piece_of_another_form_is_computed_again(tensors, metadata, work, train, capsys):
    (piece,) = Path("cache").glob("features/*/*.safetensors")
    data = safetensors.torch.save(tensors, metadata)
    piece.unlink()
    piece.with_name(f"{piece.name[:24]}-{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    main(["cache"])
    train(Path("colours"), "--trainer.fast_dev_run=true")
    assert "is damaged and will be recomputed" in capsys.readouterr().out


@pytest.mark.fault("message that would list thousands of classes")
def test_repeated_messages_are_five_and_a_count(capsys):
    items = [
        Item(f"{label}/{number}", label, hashlib.sha256(b"%d %d" % (label, number)).digest())
        for label in range(2000)
        for number in range(3)
    ]
    splits.assign(items, [str(label) for label in range(2000)], 0.15, 0.15, 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("would be missing from" in line for line in lines[:5])
    assert lines[5].startswith("… and ")
    say_all(["a", "b"])
    assert capsys.readouterr().out == "a\nb\n"
