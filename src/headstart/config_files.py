"""Reads configuration files; errors give file and line."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from headstart.errors import UserError
from headstart.files import read_regular

MOST = 100_000  # values of a file whose aliases are replaced by what they stand for


def read_config(file: Path) -> yaml.MappingNode:
    """Parses a YAML file into nodes, which keep their line numbers; a duplicate key is an error."""
    try:
        content = read_regular(file)
        found = yaml.compose(content.decode(), yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {number}: not UTF-8; save the file as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{file}{line}: not YAML ({why})") from error
    if written_out(found) > MOST:
        raise UserError(f"{file}: its aliases stand for more than {MOST:,} values; write it without them")
    if found is None:
        raise UserError(f"{file}: is empty; add options, such as `model: {{lr: 0.01}}`")
    if not isinstance(found, yaml.MappingNode):
        raise UserError(f"{file}: contains no options; write them as `name: value`")
    for node in _below(found):
        _check_unique(node, file)
    return found


def _below(root: yaml.Node) -> Iterator[yaml.Node]:
    """The node and its descendants, each once, since an alias may refer to its own ancestor."""
    waiting, seen = [root], set[int]()
    while waiting:
        if id(node := waiting.pop()) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting += _children(node)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def written_out(node: yaml.Node | None) -> int:
    """The number of values if each alias is replaced by what it stands for; one to its own ancestor counts once."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1
            sizes[id(node)] += sum(map(size, _children(node)))
        return sizes[id(node)]

    return size(node) if node else 0


def _check_unique(node: yaml.Node, file: Path) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = str(key.value), line_of(key)
        if name in lines:
            raise UserError(f"{file}, line {line}: {name} is already in line {lines[name]}; keep one")
        lines[name] = line


def line_of(node: yaml.Node) -> int:
    """The first line of a node, from 1."""
    return int(node.start_mark.line) + 1
