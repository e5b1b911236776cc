"""Runs Python programs in forks of a process that has imported the libraries: a second each instead of seven.

`python` and `headstart` of the folder that ``programs`` makes are small clients. They hand their arguments, working
directory, environment and open files to the server, which forks; the child imports headstart itself, from wherever its
PYTHONPATH says, and ends with the status that the client then ends with.
"""

import array
import atexit
import contextlib
import importlib
import json
import os
import runpy
import socket
import sys
from pathlib import Path

# Everything slow that headstart imports, and nothing of headstart.
LIBRARIES = (
    *("torch", "torchvision.transforms.v2", "pytorch_lightning.cli", "torchmetrics.classification", "rich.progress"),
    *("tensorboard.backend.event_processing.event_accumulator", "torch.utils.tensorboard", "matplotlib.figure"),
    *("matplotlib.backends.backend_agg", "safetensors.torch", "torch.fx.experimental.optimization", "jinja2", "yaml"),
    *("torch.fx.passes.split_module", "filelock", "platformdirs", "torch._dynamo"),
)
CLIENT = """#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([[{first!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(request)
status = server.recv(4)
sys.exit(int.from_bytes(status, "big") if status else 1)
"""


def programs(folder: Path) -> Path:
    """A folder with the two clients; `serve` with its path has to be running."""
    folder.mkdir()
    for name, first in (("python", ""), ("headstart", "headstart")):
        client = folder / name
        client.write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket"), first=first))
        client.chmod(0o755)
    return folder


def serve(address: str) -> None:
    """Forks a child a request, for ever."""
    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:  # the grandchild runs the program, so that its end can be told while others run
            listener.close()
            answer(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def answer(connection: socket.socket) -> None:
    """Runs the program of one request in a child, and tells its status."""
    files = array.array("i")
    size, ancillary, *_ = connection.recvmsg(4, socket.CMSG_SPACE(3 * files.itemsize))
    files.frombytes(ancillary[0][2])
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(65_536)
    arguments, folder, environment = json.loads(request)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        os._exit(run(arguments))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall((status if status >= 0 else 128 - status).to_bytes(4, "big"))
    os._exit(0)


def run(arguments: list[str]) -> int:
    """Runs what the interpreter would run for these arguments; gives the exit status."""
    first, *rest = arguments
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        if first:  # the name of an installed command
            sys.argv = [first, *rest]
            from headstart.cli import console

            console()
        elif rest[0] == "-c":
            sys.argv = ["-c", *rest[2:]]
            sys.path.insert(0, "")
            exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
        elif rest[0] == "-m":
            sys.argv = rest[1:]
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = rest
            sys.path.insert(0, str(Path(rest[0]).resolve().parent))
            runpy.run_path(rest[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status


if __name__ == "__main__":
    serve(sys.argv[1])
