"""Trains a head on a folder of images: `python train.py --data.root=path/to/photos`; without a root, on the demo."""

import sys
from pathlib import Path

from headstart.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], root=Path(__file__).resolve().parent / "data" / "clipart")
