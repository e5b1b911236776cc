"""Pages from the templates that lie next to the code."""

from typing import Any

from jinja2 import Environment, PackageLoader


def rendered(template: str, **values: Any) -> bytes:
    """A page; text from file names is escaped."""
    environment = Environment(loader=PackageLoader("headstart", ""), autoescape=True, trim_blocks=True)
    return environment.get_template(template).render(**values).encode(errors="backslashreplace")
