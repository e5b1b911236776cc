"""The `embed` command: writes the features of images to a file."""

from collections.abc import Sequence

from headstart.errors import UserError
from headstart.label.heap import add_features, files_and_folders, load
from headstart.label.tables import check_output, write_features
from headstart.parser import parser_of, required
from headstart.terminal import quiet_libraries, say


def embed(options: Sequence[str]) -> dict[str, int]:
    """Writes the features of files and folders of images, computed once and cached.

    Returns the number of `images`, their `width`, and the number of files that were `skipped`.
    """
    quiet_libraries()
    parser = parser_of("embed", "PATH…")
    parser.add_argument("paths", nargs="*", type=str, help="files and folders")
    parser.add_argument(
        "--output",
        type=str | None,
        help="new .parquet, .npy or .safetensors file; the last two write a .csv of paths too",
    )
    add_features(parser)
    given = parser.parse_args(list(options))
    required(given, "--output")
    if not given.paths:
        raise UserError("no PATH; give files or folders of images")
    check_output(given.output)
    store, _ = load(files_and_folders(given.paths), given)
    matrix = store.matrix(store.items)
    written = write_features(given.output, [item.path for item in store.items], matrix)
    say(f"embed:    {len(matrix)} images, {matrix.width} features each, and {len(store.skipped)} that cannot be read")
    say(f"features: {' and '.join(map(str, written))}")
    return {"images": len(matrix), "width": matrix.width, "skipped": len(store.skipped)}
