"""The findings as a page with pictures: copies side by side, suspect labels next to their nearest neighbours."""

from collections.abc import Sequence
from typing import Any

from headstart.audit.findings import KINDS, Finding
from headstart.data.splits import Item
from headstart.data.store import FeatureStore
from headstart.report.page import common_folder, jpeg
from headstart.report.tensorboard import thumbnails
from headstart.runs.folder import command_line
from headstart.templates import rendered

# Rows per kind, pictures per row, and bytes of all pictures, for a page under 5 MB.
MAX_ROWS, MAX_PICTURES, MAX_BYTES = 30, 6, 3_500_000


def page(title: str, findings: Sequence[Finding], items: Sequence[Item], store: FeatureStore) -> bytes:
    """The page; ``items`` are the readable images."""
    names, position = store.source.class_names, {item.path: number for number, item in enumerate(items)}
    thumbnail, common, room = thumbnails(store, items), common_folder(list(position)), MAX_BYTES

    def tile(path: str, *lines: str) -> dict[str, Any]:
        nonlocal room
        picture = jpeg(thumbnail(position[path])) if path in position and room > 0 else ""
        room -= len(picture)
        return {"picture": picture, "lines": lines, "path": path.removeprefix(common)}

    sections = []
    for kind, meaning in KINDS.items():
        rows: dict[object, list[Finding]] = {}
        for found in (found for found in findings if found.kind == kind):
            rows.setdefault(found.group or found.path, []).append(found)
        shown = []
        for together in list(rows.values())[:MAX_ROWS]:
            tiles = [tile(found.path, found.class_name, found.split) for found in together[:MAX_PICTURES]]
            tiles += [tile(path, f"near: {items[position[path]].named(names)}") for path in together[0].near]
            shown.append({"note": together[0].note, "tiles": tiles})
        sections.append({"meaning": meaning, "rows": shown, "more": len(rows) - len(shown)})
    about = {"common": common, "images": len(items), "command": command_line()}
    return rendered("audit/check.html.jinja", title=title, sections=sections, **about)
