"""The precision of the features: the one asked for, or the faster of bf16 and fp32."""

import hashlib
import importlib.util
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

import torch
from filelock import FileLock

from headstart.errors import UserError
from headstart.files import read_regular, write_atomically
from headstart.model.backbone import FrozenBackbone
from headstart.terminal import say

FeaturePrecision = Literal["auto", "bf16", "fp32", "int8"]
Arithmetic = Literal["bf16", "fp32", "int8"]

# Features change in their last bits with the batch size, so it is fixed, and the last batch is padded.
BATCH = 32
MANY = 300  # images from which half a second of measuring pays
SECONDS = 0.5
INT8_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def dtype_of(arithmetic: Arithmetic) -> torch.dtype:
    """The dtype in which the torch copy of the backbone computes."""
    return torch.bfloat16 if arithmetic == "bf16" else torch.float32


def missing_for_int8() -> list[str]:
    """The packages that int8 needs and that are not installed."""
    return [name for name in INT8_NEEDS if importlib.util.find_spec(name) is None]


def as_trained(precision: FeaturePrecision, trained: str | None, device: torch.device) -> FeaturePrecision:
    """What ``auto`` is for a trained head: the arithmetic of its training, if this machine has it."""
    if precision != "auto" or trained not in get_args(Arithmetic):
        return precision
    if trained == "int8":
        if device.type == "cpu" and not missing_for_int8():
            return "int8"
        say("features: fp32; the head was trained on int8, which needs a CPU and pip install -e '.[fast]'")
    fast = device.type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    if trained == "bf16" and fast:
        return "bf16"
    if trained == "bf16":
        say("features: fp32, since this CPU has no bf16, in which the head was trained")
    return "fp32"


def chosen(
    precision: FeaturePrecision, backbone: FrozenBackbone, device: torch.device, images: int, folder: Path
) -> Arithmetic:
    """What ``auto`` is for this many images on this machine; any other precision is itself.

    No rule is right for every processor: with avx512_bf16 but without matrix units (AMX), the better one depends on the
    network and the instructions in use. So ``auto`` measures, unless there are few images, and remembers in ``folder``.
    """
    if precision == "int8" and device.type != "cpu":
        raise UserError(f"feature_precision=int8: is for CPUs, not for {device.type}; use auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    if images < MANY:
        return "bf16" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else "fp32"
    return _fastest(backbone, folder)


def _fastest(backbone: FrozenBackbone, folder: Path) -> Arithmetic:
    """The faster one by a measurement, which is made once per processor, library and network."""
    about = {
        "processor": _processor(),
        "instructions": [torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA")],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "network": [backbone.name, backbone.layers, backbone.preprocessing.crop_size],
    }
    text = json.dumps(about, sort_keys=True)
    file = folder / "arithmetic" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # processes of one run decide alike, and measure undisturbed
            speeds = _remembered(file)
            if not speeds:
                speeds = images_per_second(backbone)
                write_atomically(file, json.dumps(about | speeds, indent=1).encode())
    except OSError:  # a folder that is not writable
        speeds = images_per_second(backbone)
    bf16, fp32 = speeds["bf16"], speeds["fp32"]
    arithmetic: Arithmetic = "bf16" if bf16 > fp32 else "fp32"
    say(f"features: {arithmetic}; this machine computes {bf16:.0f} images/s in bf16, {fp32:.0f} in fp32")
    return arithmetic


def _remembered(file: Path) -> dict[Arithmetic, float]:
    """The speeds that were measured before; empty if there are none."""
    try:
        found = json.loads(read_regular(file))
        with suppress(OSError):  # of another user
            file.touch()  # the date of the last use, for pruning
        return {"bf16": float(found["bf16"]), "fp32": float(found["fp32"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


@torch.no_grad()
def images_per_second(backbone: FrozenBackbone, seconds: float = SECONDS) -> dict[Arithmetic, float]:
    """The speed of only the backbone on the CPU, in each precision; the fastest of interleaved passes."""
    side = backbone.preprocessing.crop_size
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8)
    kinds: tuple[Arithmetic, ...] = ("bf16", "fp32")
    copies = {kind: backbone.for_extraction(dtype_of(kind), torch.device("cpu")) for kind in kinds}
    best = dict.fromkeys(kinds, float("inf"))
    for copy in copies.values():  # the first pass prepares the weights
        copy(images)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for kind, copy in copies.items():
            before = time.perf_counter()
            copy(images)
            best[kind] = min(best[kind], time.perf_counter() - before)
    return {kind: BATCH / taken for kind, taken in best.items()}


def _processor() -> str:
    """The model of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
