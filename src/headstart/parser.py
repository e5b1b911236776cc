"""What every verb's options have in common: short help, errors of one line, ranges checked before any work."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from headstart.errors import UserError
from headstart.ranges import arguments_of

# The trainer's options that the short help shows.
SHORT_HELP = ("max_epochs", "accelerator", "devices", "precision")


class OptionParser(ArgumentParser):
    """Short help, and errors of one line with the nearest valid name."""

    usage_line = "headstart VERB [options]"  # the first line of the help
    last_line = ""  # the last line of the short help; empty: none
    full = False  # whether the help is jsonargparse's own page of every option

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ``UserError``."""
        raise UserError(self._one_line(message)) from ex

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """As jsonargparse's, which would wait for a FIFO."""
        for place, given in enumerate(args or []):
            file = given.removeprefix("--config=") if given != "--config" else "".join(args[place + 1 : place + 2])
            if given.startswith("--config") and Path(file).exists() and not Path(file).is_file():
                raise UserError(f"--config={file}: not a regular file")
        return super().parse_args(args, *others, **options)

    def format_help(self, formatter: Any = None) -> str:
        """One line per option; of the Trainer's, those that are often used."""
        if self.full:
            return super().format_help(formatter)
        lines = [f"usage: {self.usage_line}", ""]
        for action in self._actions:
            name = next((option for option in action.option_strings if option.startswith("--")), "")
            group, _, key = name.removeprefix("--").partition(".")
            hidden = action.help in (None, "==SUPPRESS==", "Path to a configuration file.") or key == "help"
            if not name or hidden or (group == "trainer" and key not in SHORT_HELP):
                continue
            described = " ".join(str(action.help).replace("%%", "%").split())
            described = re.sub(r"\s*\((type|default|required).*", "", described).split(". ")[0].rstrip(".")
            default = "" if action.default in (None, "==SUPPRESS==") else f" [{action.default}]"
            lines.append(f"  {name:28}{described}{default}")
        return "\n".join([*lines, *filter(None, ["", self.last_line])]) + "\n"

    def _one_line(self, message: str) -> str:
        """jsonargparse's message, which lists every type that was tried, as: option, value, what is wrong."""
        message = " ".join(message.split())
        if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
            return self._unknown(unknown[1].split("=")[0])
        if unknown := re.search(r"Key '?\"?([\w.]+)'?\"? is not expected", message, re.IGNORECASE):
            return self._unknown("--" + unknown[1])
        message = re.sub(r'Parser key "(.+?)": ?', r"--\1: ", message)
        value = re.search(r"Given value: (\S+)|: (\S+) does not conform|with base 10: (\S+)|to float: (\S+)", message)
        given = f"{next(filter(None, value.groups()))}: " if value else ""
        option = message.split(": ")[0]
        if restriction := re.search(r"does not conform to restriction (.*?)(?: - |$)", message):
            return f"{option}: {given}must be a number {restriction[1].replace('v', '').strip()}"
        if number := re.search(r"invalid literal for int|could not convert string to float", message):
            return f"{option}: {given}is not {'a whole' if 'int' in number[0] else 'a'} number"
        if union := re.search(r"Union subtypes Subtypes: \[(.*)\] Errors", message):
            message = f"{option}: {given}is none of {union[1]}"
        return re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.(?=\w)", r"\1", message)

    def _unknown(self, given: str) -> str:
        names = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        near = difflib.get_close_matches(given, names, n=1)
        return f"{given}: no such option; {f'did you mean {near[0]}?' if near else '--help lists them'}"


def parser_of(verb: str, arguments: str = "") -> OptionParser:
    """An empty parser for a verb; ``arguments`` is what its usage line shows beside the options."""
    parser = OptionParser(allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a file of options; later ones win")
    parser.usage_line = f"headstart {verb} [options]{f' {arguments}' if arguments else ''}"
    return parser


def add_options(parser: OptionParser, of: type, group: str, names: Sequence[str]) -> None:
    """Adds some of a class's arguments, as ``--group.name``, with their types, defaults and descriptions."""
    parser.add_class_arguments(of, group, skip=arguments_of(of) - set(names), as_group=False)


def add_checkpoint(parser: OptionParser) -> None:
    """Adds ``--ckpt_path``, of a trained head."""
    parser.add_argument("--ckpt_path", type=str | None, help="a trained head, such as logs/…/checkpoints/best.ckpt")


def add_accelerator(parser: OptionParser) -> None:
    """Adds ``--accelerator``."""
    parser.add_argument(
        "--accelerator", type=str, default="auto", help="auto, cpu, gpu, or another of Lightning's names"
    )


def add_run(parser: OptionParser, name: str) -> None:
    """Adds where a verb works and where its folder goes; ``name`` describes the folder's default name in the help."""
    add_accelerator(parser)
    parser.add_argument("--name", type=str | None, help=f"name of the run; None: {name}")
    parser.add_argument("--logs", type=str, default="logs", help="where the run's folder goes")


def required(given: Any, *options: str) -> None:
    """Stops where an option is missing without which the verb cannot work."""
    for option in options:
        if given[option.removeprefix("--")] is None:
            raise UserError(f"{option} is missing; --help lists the options")
