"""The standard streams of whole processes, as a shell makes them; and the programs that images would start."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPOSITORY, draw, newest_run

SMALL = "--model.image_size=32 --report=false --trainer.max_epochs=2"


@pytest.fixture(params=[pytest.param("1", marks=pytest.mark.slow, id="unbuffered"), pytest.param("", id="buffered")])
def shell(request):
    """Runs a line in bash, in which `headstart` is the command; gives exit status, output and errors."""

    def run(line: str, **more: str) -> tuple[int, str, str]:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "PYTHONUNBUFFERED": request.param} | more
        line = f'headstart() {{ "{sys.executable}" -m headstart "$@"; }}; {line}'
        done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.fault("closed standard input, output or error")
def test_closed_streams(checkpoint, trained, shell):
    assert "colours" in shell("headstart runs <&-")[1]
    assert "colours" in shell("headstart runs 2>&-")[1]
    for closed in (">&-", ">&- 2>&-", "<&- >&- 2>&-"):
        assert shell(f"headstart runs {closed}") == (0, "", "")
    assert shell("headstart nonsense 2>&-") == (2, "", "")
    # wing: deploy
    status, _, errors = shell(f"headstart predict --ckpt_path={checkpoint} {trained}/colours/red/000.png >&-")
    assert (status, errors) == (2, "error: --output is missing: the standard output is closed\n")
    # /wing
    assert shell(f"headstart train --data.root={trained}/colours {SMALL} --name=silent <&- >&- 2>&-")[0] == 0
    assert (newest_run() / "result.json").is_file()
    assert newest_run().parent.name == "silent"


@pytest.mark.fault("output to a full device")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_device(checkpoint, trained, shell):
    commands = ["--help", "runs", "runs --help", f"train --data.root={trained}/colours {SMALL}"]
    commands += [f"predict --ckpt_path={checkpoint} {trained}/colours/red"]  # wing: deploy
    for command in commands:
        status, _, errors = shell(f"headstart {command} > /dev/full")
        assert status == 2, command
        assert errors.endswith("error: standard output: No space left on device\n"), command
    assert shell("headstart nonsense 2> /dev/full") == (2, "", "")


@pytest.mark.fault("reader that closes the output early")
def test_a_reader_that_has_enough(trained, shell):
    for command in (f"train --data.root={trained}/colours {SMALL}", "train --help_all"):
        _, out, errors = shell(f"headstart {command} | head -c 1; echo status ${{PIPESTATUS[0]}}", LC_ALL="C.UTF-8")
        assert not errors
        # Of what is written at once, a pipe takes all before its reader ends.
        assert re.search(r"status (\d+)", out)[1] in ({"141"} if command.startswith("train --data") else {"141", "0"})


HOSTILE = {
    "drawing.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n%%EOF\n",
    "binary.png": b"\xc5\xd0\xd3\xc6 \0\0\0d\0\0\0" + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "picture.tif": b"%PDF-1.4\n%%EOF\n",
    "script.jpg": b"#!/bin/sh\ntouch executed\n",
    "film.gif": b"#EXTM3U\nfile:///etc/passwd\n",
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "magick.jpg": b"push graphic-context\nfill 'url(https://localhost/x\"|touch executed\")'\n",
    "metafile.bmp": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
    "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n%%EOF\n",
}


def programs_of(*command: str) -> set[str]:
    """The programs that a command starts, itself or by its children; it has to succeed."""
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=execve,execveat", "-e", "signal=none", "-o", "trace"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    command = (*strace, sys.executable, "-m", "headstart", *command)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r'execve(?:at)?\([^"]*"(.*?)"', Path("trace").read_text()))


@pytest.mark.fault("image format that would start a program")
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_strace_sees_no_program_started(tmp_path):
    """None but those that start without such images: Python itself, and what a library asks for when it is imported."""
    plain, hostile = (draw(tmp_path / name, images=60) for name in ("plain", "hostile"))
    for name, content in HOSTILE.items():
        (hostile / "red" / name).write_bytes(content)
    options = [*SMALL.split(), "--name=run"]
    usual = programs_of("train", f"--data.root={plain}", *options)
    assert sys.executable in usual
    for more in ([], ["--data.cache=false", "--data.num_workers=1"]):
        assert programs_of("train", f"--data.root={hostile}", *options, *more) <= usual
        skipped = (newest_run() / "skipped.csv").read_text()
        assert skipped.count("not an image") == len(HOSTILE) - 1, skipped  # an .eps is no image here
    # wing: deploy
    best, images = newest_run() / "checkpoints/best.ckpt", [str(hostile / "red" / name) for name in HOSTILE]
    assert programs_of("predict", f"--ckpt_path={best}", str(hostile), *images, "--output=rows.csv") <= usual
    assert Path("rows.csv").read_text().count("not an image") == 2 * len(HOSTILE) - 1
    # /wing
    assert not list(tmp_path.rglob("executed"))
