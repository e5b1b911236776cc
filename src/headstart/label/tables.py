"""Features as a file for other tools: .parquet, .npy or .safetensors."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from headstart.errors import UserError
from headstart.features.matrix import FeatureMatrix
from headstart.files import csv_bytes, new_file, new_path, write_new

SUFFIXES = (".parquet", ".npy", ".safetensors")


def check_output(output: str) -> None:
    """Raises ``UserError`` if the file already exists, has another suffix, or needs a package that is missing."""
    file = new_path("--output", output)
    if file.suffix not in SUFFIXES:
        raise UserError(f"--output={output}: name it {' or '.join(f'*{suffix}' for suffix in SUFFIXES)}")
    if file.suffix != ".parquet":
        new_path("--output", file.with_suffix(".csv"))
    elif not find_spec("pyarrow"):
        raise UserError(f"--output={output}: needs pyarrow: pip install -e '.[parquet]'")


def write_features(output: str, paths: Sequence[str], matrix: FeatureMatrix) -> list[Path]:
    """Writes new files: a table of path and features, or the features [N, D] and a CSV file of the paths."""
    file = Path(output).expanduser()
    with new_file("--output", file) as temporary:
        if file.suffix == ".parquet":
            _write_parquet(temporary, paths, matrix)
        elif file.suffix == ".npy":
            with temporary.open("wb") as opened:
                np.save(opened, matrix.whole().numpy())
        else:
            save_file({"features": matrix.whole()}, temporary)
    if file.suffix == ".parquet":
        return [file]
    return [file, write_new("--output", file.with_suffix(".csv"), csv_bytes([["path"], *([path] for path in paths)]))]


def _write_parquet(file: Path, paths: Sequence[str], matrix: FeatureMatrix) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    names = [path.encode(errors="backslashreplace").decode() for path in paths]  # Parquet's strings are Unicode
    schema = pa.schema([("path", pa.string()), ("features", pa.list_(pa.float32(), matrix.width))])
    with ParquetWriter(file, schema) as writer:
        for start, block in zip(range(0, len(names), 4096), matrix.blocks(4096), strict=True):
            features = pa.FixedSizeListArray.from_arrays(block.flatten().numpy(), matrix.width)
            writer.write_table(pa.table([pa.array(names[start : start + 4096]), features], schema=schema))
