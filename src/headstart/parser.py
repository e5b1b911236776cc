"""The options of every command: short help, one-line errors, ranges checked before any work."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from headstart.config_files import line_of, read_config
from headstart.errors import UserError
from headstart.files import flat
from headstart.ranges import OpenFraction, Positive, RunName, Share, arguments_of

# The Trainer's options in the short help.
SHORT_HELP = ("max_epochs", "accelerator", "devices", "precision")
SEVERAL_DEVICES = ("devices", "num_nodes", "strategy")  # the Trainer's, which commands for one device lack


class OptionParser(ArgumentParser):
    """Short help, and one-line errors that suggest the nearest valid name."""

    usage_line = "headstart COMMAND [options]"  # the first line of the help
    last_line = ""  # the last line of the short help; empty: none
    paths = True  # whether bare words are paths, if there may be any
    full = False  # whether to print jsonargparse's own help, with every option

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ``UserError``, with the file and line if the option comes from a file."""
        line = self._one_line(message)
        place = self._places.get(line.split(":")[0])
        raise UserError(f"{place}: {line}" if place else line) from ex

    def print_help(self, file: Any = None) -> None:
        """As in argparse, but raises if the help cannot be written."""
        print(self.format_help(), end="", file=file)

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """As in jsonargparse, with or without leading dashes; configuration files are checked first."""
        self._places: dict[str, str] = {}  # file and line of each option from a file
        args = self._with_dashes(args or [])
        for place, given in enumerate(args):
            name, equals, file = given.partition("=")
            file = file if equals else "".join(args[place + 1 : place + 2])
            whole = name in ("-c", "--config")
            if not whole and not self._is_group(name):
                self._places.pop(name, None)
            # pathlib raises for text that cannot be a path
            elif os.path.exists(file) and (whole or not os.path.isdir(file)):  # noqa: PTH110, PTH112
                self._check_config(Path(file), read_config(Path(file)), "" if whole else f"{name[2:]}.")
            elif not whole:
                own = [option for option in self._options() if option.startswith(f"{name}.")]
                first = next(option for option in own if not option.endswith(".help"))
                raise UserError(f"{name}={file}: is a group of options, such as {first}, or a file of them")
        try:
            return super().parse_args(args, *others, **options)
        except UnicodeError as error:
            odd = next((given for given in args if not _is_unicode(given)), "an option")
            raise UserError(f"{odd}: not UTF-8; option values must be text") from error

    def _with_dashes(self, args: Sequence[str]) -> list[str]:
        """Reads `model.lr=0.01`, as in other templates, as `--model.lr=0.01`, unless bare words are paths."""
        if self.paths and any(action.nargs == "*" for action in self._actions if not action.option_strings):
            return list(args)
        found = []
        for before, word in zip(["", *args], args, strict=False):
            named = self._option_string_actions.get(before)
            is_value = before.startswith("-") and "=" not in before and not (named and named.nargs == 0)
            if "=" in word and not word.startswith("-") and not is_value:
                name = re.split(r"\+?=", word)[0]
                word = self._full_name(name) + word[len(name) :]
            found.append(word)
        return found

    def _full_name(self, name: str) -> str:
        """The option with this name, or the only option that ends in it, or that of the data."""
        options, full = self._options(), f"--{name}"
        if any(full == option or full.startswith(f"{option}.") for option in options):
            return full
        ending = [option for option in options if option.endswith(f".{name}")]
        if f"--data.{name}" in ending:
            return f"--data.{name}"
        if len(ending) > 1:
            raise UserError(f"{name}: matches {len(ending)} options; give one in full: {', '.join(ending)}")
        return ending[0] if ending else self.error(f"Unrecognized arguments: {full}")

    def _check_config(self, file: Path, found: yaml.MappingNode, group: str = "") -> None:
        """Refuses unknown keys, and records the line of each known one."""
        known = {f"--{action.dest}" for action in self._actions} | {f"--{group}<<"}  # a YAML merge
        for key, value in found.value:
            name = f"--{group}{key.value}"
            self._places[name] = f"{file}, line {line_of(key)}"
            if self._is_group(name):
                if not isinstance(value, yaml.MappingNode):
                    self.error(f"{name}: is a group of options; write them indented below it")
                self._check_config(file, value, f"{name[2:]}.")
            elif name not in known:
                self.error(f"Unrecognized arguments: {name}")

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def _is_group(self, name: str) -> bool:
        return any(option.startswith(f"{name}.") and option != f"{name}.help" for option in self._options())

    def dump(self, cfg: Any, *others: Any, **options: Any) -> str:
        """As in jsonargparse; refuses a path that is not Unicode, which YAML cannot hold."""
        for name, value in flat(cfg.as_dict()).items():
            if isinstance(value, str) and not _is_unicode(value):
                raise UserError(f"--{name}={value}: not UTF-8, so config.yaml cannot record it; rename it")
        return str(super().dump(cfg, *others, **options))

    def format_help(self, formatter: Any = None) -> str:
        """One line per option; only the most used options of the Trainer."""
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
        """Shortens jsonargparse's message, which lists every type tried, to: option, value, what is wrong."""
        message = " ".join(message.split())
        if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
            return self._unknown(unknown[1].split("=")[0])
        if unknown := re.search(r"Key '?\"?([\w.]+)'?\"? is not expected", message, re.IGNORECASE):
            return self._unknown("--" + unknown[1])
        message = re.sub(r'Parser key "(.+?)": ?', r"--\1: ", message)
        value = re.search(r"Given value: (\S+)|: (\S+) does not conform|with base 10: (\S+)|to float: (\S+)", message)
        given = f"{next(filter(None, value.groups()))}: " if value else ""
        option = message.split(": ")[0]
        if restriction := re.search(r"does not conform to restriction (.*?)(?: - | Given|$)", message):
            return f"{option}: {given}must be a number {restriction[1].replace('v', '').strip()}"
        if number := re.search(r"invalid literal for int|could not convert string to float", message):
            return f"{option}: {given}is not {'a whole' if 'int' in number[0] else 'a'} number"
        if "does not match regular expression" in message:
            return f"{option}: {given}is not a valid folder name; leave out / and .."
        if union := re.search(r"Union subtypes Subtypes: \[(.*)\] Errors", message):
            message = f"{option}: {given}is not one of {union[1]}"
        return re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.(?=\w)", r"\1", message)

    def _unknown(self, given: str) -> str:
        if given.split(".")[-1].lstrip("-") in SEVERAL_DEVICES and "--accelerator" in self._options():
            return f"{given}: this command uses one device, which --accelerator chooses; leave it out"
        names = {f"--{option.split('.')[-1].lstrip('-')}": option for option in self._options()}
        names |= {option: option for option in self._options()}
        near = difflib.get_close_matches(given, names, cutoff=0.7)
        near.sort(key=lambda name: not names[name].endswith(SHORT_HELP))  # --epochs is max_epochs, not min_epochs
        return f"{given}: no such option; {f'did you mean {names[near[0]]}?' if near else '--help lists them'}"


def _is_unicode(text: str) -> bool:
    """Whether the text came from valid UTF-8."""
    return text == text.encode(errors="replace").decode()


def parser_of(verb: str, arguments: str = "") -> OptionParser:
    """An empty parser for a command; ``arguments`` follows the options in its usage line."""
    parser = OptionParser(allow_abbrev=False)
    parser.add_argument("--config", action="config", help="file of options; later options override earlier ones")
    parser.usage_line = f"headstart {verb} [options]{f' {arguments}' if arguments else ''}"
    return parser


def add_options(parser: OptionParser, of: type, group: str, names: Sequence[str]) -> None:
    """Adds some arguments of a class as ``--group.name``, with their types, defaults and descriptions."""
    parser.add_class_arguments(of, group, skip=arguments_of(of) - set(names), as_group=False)


def add_checkpoint(parser: OptionParser) -> None:
    """Adds ``--ckpt_path``, a trained head."""
    parser.add_argument("--ckpt_path", type=str | None, help="trained head, such as logs/…/checkpoints/best.ckpt")


def add_answers(parser: OptionParser) -> None:
    """Adds how a head answers: how many classes, where with `unknown`, and with which sets."""
    parser.add_argument("--top_k", type=Positive, default=5, help="number of most probable classes per row")
    parser.add_argument(
        "--unknown",
        type=OpenFraction | None,
        help="answer `unknown` if at most this share of validation images is as far from the classes; None: never",
    )
    parser.add_argument("--min_probability", type=Share, default=0.0, help="answer `unknown` below this probability")
    parser.add_argument(
        "--coverage",
        type=OpenFraction | None,
        help="add a set of classes that contains the true one for this share of images, such as 0.9; None: no sets",
    )


def add_accelerator(parser: OptionParser) -> None:
    """Adds ``--accelerator``."""
    parser.add_argument(
        "--accelerator", type=str, default="auto", help="device: auto, cpu, gpu, or another Lightning name"
    )


def add_run(parser: OptionParser, name: str) -> None:
    """Adds ``--accelerator``, ``--name`` and ``--logs``; ``name`` describes the default name of the run in the help."""
    add_accelerator(parser)
    parser.add_argument("--name", type=RunName | None, help=f"name of the run; None: {name}")
    parser.add_argument("--logs", type=str, default="logs", help="where to write the folder of the run")


def required(given: Any, *options: str) -> None:
    """Raises ``UserError`` if an option that the command needs is missing."""
    for option in options:
        if given[option.removeprefix("--")] is None:
            raise UserError(f"{option} is missing; --help lists the options")
