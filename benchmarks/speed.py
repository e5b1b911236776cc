"""Time to train a head on photographs, in six ways; run nothing else on the machine.

usage: python benchmarks/speed.py DATA [--epochs=25] [--only=limit,cold,warm,int8,lightning,plain]

DATA holds train/ and val/, such as the PyTorch transfer-learning tutorial's hymenoptera. Everything is at 224 pixels
on random weights, since the time does not depend on them. Each way runs in a process of its own; imports are not
counted.

  plain      the article's loop: plain PyTorch, fp32, batch 32, 2 workers; images decoded and the frozen ResNet18 run
             in every epoch, over train and val
  lightning  the same through headstart without its cache
  cold       headstart, with an empty cache
  warm       headstart, with the cache of the cold run
  int8       headstart with --data.feature_precision=int8 and an empty cache; the network was quantised before
  limit      decoding each image once (one thread per core), then one forward pass of each by the fastest engine of
             torch in bf16, torch in fp32 and onnxruntime in fp32, and by onnxruntime in int8
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("limit", "cold", "warm", "int8", "lightning", "plain")
INT8 = "--data.feature_precision=int8"
SIZE, RESIZE, BATCH = 224, 256, 32


def plain(data: Path, epochs: int) -> dict[str, Any]:
    import torch
    from torch import nn
    from torchvision import datasets, models, transforms

    started, images = time.perf_counter(), 0
    steps = [transforms.Resize(RESIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    steps.append(transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    folders = {name: datasets.ImageFolder(str(data / name), transforms.Compose(steps)) for name in ("train", "val")}
    loaders = {
        name: torch.utils.data.DataLoader(folder, BATCH, shuffle=name == "train", num_workers=2)
        for name, folder in folders.items()
    }
    model = models.resnet18(weights=None)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = nn.Linear(512, len(folders["train"].classes))
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.001, momentum=0.9)
    for _ in range(epochs):
        for name, loader in loaders.items():
            model.train(name == "train")
            right = 0
            for inputs, labels in loader:
                with torch.set_grad_enabled(name == "train"):
                    logits = model(inputs)
                    loss = nn.functional.cross_entropy(logits, labels)
                if name == "train":
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                right += int((logits.argmax(1) == labels).sum())
                images += len(labels)
    return {"seconds": time.perf_counter() - started, "images through the backbone": images}


def headstart(data: Path, epochs: int, *options: str) -> dict[str, Any]:
    import matplotlib.pyplot  # noqa: F401  # imports are not counted
    import torch.fx.experimental.optimization
    from torch.utils import tensorboard  # noqa: F401

    from headstart.cli import main
    from headstart.features.matrix import Shard
    from headstart.model.backbone import FrozenBackbone
    from headstart.verbs import train

    assert train  # imported before the clock starts
    images = [0]

    def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, FrozenBackbone):
            images[0] += len(inputs[0])

    torch.nn.modules.module.register_module_forward_hook(count)
    fixed = [f"--data.root={data}", "--model.weights=random", f"--model.image_size={SIZE}"]
    fixed += [f"--trainer.max_epochs={epochs}", "--data.num_workers=2", "--report=false"]
    started = time.perf_counter()
    result = main(["train", *fixed, *options])
    seconds = time.perf_counter() - started
    parts = {name: result["seconds"].get(name, 0.0) for name in ("scan", "quantise", "features", "fit", "test")}
    cache = Path(os.environ["HEADSTART_CACHE"])
    # Time of decoding and the backbone, as recorded in the cache; `features` includes reading, folding and writing.
    parts["extraction"] = sum(Shard.open(path).seconds for path in cache.glob("features/*/*.safetensors"))
    return {"seconds": seconds, "images through the backbone": images[0]} | parts


def limit(data: Path, epochs: int) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    import torch
    import torch.fx.experimental.optimization

    from headstart.decoding import decode
    from headstart.features.int8 import network_of, session, to_onnx
    from headstart.images import preprocess
    from headstart.model.backbone import FrozenBackbone

    cpu, cache = torch.device("cpu"), Path(os.environ["HEADSTART_CACHE"])
    backbone = FrozenBackbone(weights="random", image_size=SIZE)
    engines: dict[str, Any] = {name: network_of(backbone, name, cpu, cache) for name in ("bf16", "fp32", "int8")}
    example = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    onnx = session(to_onnx(backbone, example, ("images", "features")).SerializeToString())
    engines["onnxruntime fp32"] = lambda images: onnx.run(None, {"images": images.numpy()})
    paths = sorted(path for path in data.rglob("*") if path.is_file())

    def pixels(path: Path) -> torch.Tensor:
        return preprocess(decode(path.read_bytes(), backbone.preprocessing), backbone.preprocessing)

    with torch.no_grad():
        started = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = list(pool.map(pixels, paths))
        decoding = time.perf_counter() - started
        batches = [torch.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        forward = {}
        for name, engine in engines.items():
            engine(batches[0])
            started = time.perf_counter()
            for batch in batches:
                engine(batch)
            forward[name] = time.perf_counter() - started
    in_int8 = forward.pop("int8")
    limits = {"seconds": decoding + min(forward.values()), "seconds in int8": decoding + in_int8}
    return limits | {"images through the backbone": len(images), "decoding": decoding} | forward | {"int8": in_int8}


def child(way: str, data: Path, epochs: int) -> dict[str, Any]:
    if way == "plain":
        return plain(data, epochs)
    if way == "limit":
        return limit(data, epochs)
    options = {"lightning": ["--data.cache=false"], "int8": [INT8]}
    return headstart(data, epochs, *options.get(way, []))


def machine() -> str:
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    amx = "with" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else "without"
    return f"{model}, {os.cpu_count()} cores, {amx} bf16 matrix units; torch {torch.__version__}"


def run(data: Path, epochs: int, ways: list[str]) -> None:
    print(machine())
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            # The network in int8 is made by `limit`.
            environment = os.environ | {
                "HEADSTART_CACHE": f"{folder}/{'int8' if way in ('int8', 'limit') else 'cache'}"
            }
            command = [sys.executable, str(Path(__file__).resolve()), "--child", way, str(data), str(epochs)]
            done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
            said = ", ".join(
                f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in found[way].items()
            )
            print(f"{way:10}{said}", flush=True)
    if "plain" in found:
        for way in set(found) - {"plain", "limit"}:
            print(f"{way} is {found['plain']['seconds'] / found[way]['seconds']:.1f} times faster than plain")
    for way, limits in (("cold", "seconds"), ("int8", "seconds in int8")):
        if way in found and "limit" in found:
            print(f"{way}: extraction runs at {found['limit'][limits] / found[way]['extraction']:.0%} of the limit")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--child":
        print("\n" + json.dumps(child(arguments[1], Path(arguments[2]), int(arguments[3]))))
    else:
        options = dict(argument.removeprefix("--").split("=") for argument in arguments[1:])
        chosen = options.get("only", ",".join(WAYS)).split(",")
        run(Path(arguments[0]).resolve(), int(options.get("epochs", 25)), chosen)
