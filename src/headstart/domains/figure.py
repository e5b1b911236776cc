"""The receiver operating characteristic of each domain."""

from collections.abc import Sequence

from PIL import Image

from headstart.domains.leave_out import LeftOut
from headstart.report.figures import domains_figure
from headstart.terminal import one_line

COLUMNS = 3


def roc_by_domain(found: Sequence[LeftOut]) -> Image.Image:
    """A panel per domain: the mean one-vs-rest curve where it was left out, and of the others' test images."""
    panels = [domains_figure({one_line(each.domain): each.unseen, "the others": each.seen}).image() for each in found]
    width, height = (max(getattr(panel, side) for panel in panels) for side in ("width", "height"))
    columns = min(COLUMNS, len(panels))
    sheet = Image.new("RGB", (width * columns, height * -(-len(panels) // columns)), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (width * (number % columns), height * (number // columns)))
    return sheet
