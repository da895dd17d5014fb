"""Command lines of all commands except `fit`, `validate`, `test` and `predict`.

Each command is a typed function with a docstring, from which the parser and the help are made, and beside it

    def main() -> None:
        command.run(function)
"""

import inspect
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any

import docstring_parser
from jsonargparse import DefaultHelpFormatter

from lm_lightning.cli.explain import program
from lm_lightning.cli.settings import Parser
from lm_lightning.compat.jsonargparse import option_names

FIT_FLAGS = "fit_flags"  # name of a parameter that receives all flags that are not the function's own


class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help formatter that keeps the paragraphs of a description."""


def run(function: Callable, epilog: str = "") -> Any:
    """Calls a function with the arguments of the command line, `sys.argv` without the program and the command.

    Args:
        function: The command. Its name is the command's name and its docstring is the help. Parameters without a
            default are positional arguments (a `list[str]` accepts one or more values), the others are options. A
            parameter `fit_flags: list[str]` receives all other arguments, which are flags of `fit`.
        epilog: Text at the end of the help.

    Returns:
        The value that the function returns.

    Raises:
        argparse.ArgumentError: If the command line is invalid.
    """
    parser, arguments = make_parser(function, epilog), sys.argv[2:]
    if FIT_FLAGS not in inspect.signature(function).parameters:
        return function(**vars(parser.parse_args(arguments)))
    own, fit_flags = split(arguments, option_names(parser))
    return function(fit_flags, **vars(parser.parse_args(own)))


def make_parser(function: Callable, epilog: str = "", options: bool = True) -> Parser:
    """The parser of a command, see `run`.

    Args:
        function: The command.
        epilog: Text at the end of the help.
        options: Whether to add the function's parameters to the parser, or only its name and help.
    """
    doc, name = docstring_parser.parse(function.__doc__ or ""), program(function.__name__)
    parameters = inspect.signature(function).parameters.values()
    lists = [p.name for p in parameters if p.annotation == list[str] and p.default is p.empty]
    usage = f"{name} --config CONFIG [any flag of fit] [options]" if FIT_FLAGS in lists else None
    description = "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
    parser = Parser(prog=name, usage=usage, description=description, epilog=epilog, formatter_class=Formatter)
    if options:
        helps = {parameter.arg_name: parameter.description for parameter in doc.params}
        for positional in lists:
            if positional != FIT_FLAGS:
                parser.add_argument(positional, nargs="+", type=str, help=helps.get(positional))
        parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*lists})
    return parser


def split(arguments: Sequence[str], own: Any) -> tuple[list[str], list[str]]:
    """Splits a command line into the command's own flags, with their values, and the flags of `fit`.

    Args:
        arguments: Arguments of the command line.
        own: The command's own flags, with their dashes. All except `-h` and `--help` have a value.
    """
    found, others = list[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, has_value, _ = argument.partition("=")
        if flag not in own:
            others.append(argument)
            continue
        found.append(argument)
        if waiting and not has_value and flag not in ("-h", "--help") and not re.match("--?[a-zA-Z]", waiting[0]):
            found.append(waiting.pop(0))
    return found, others


def split_list(given: Sequence[str]) -> list[str]:
    """Splits a list of names. YAML could not read some of them: it takes 2:4 for a number and *mlp* for an alias."""
    if not isinstance(given, str):
        return list(given)
    return [name for part in given.strip("[] ").split(",") if (name := part.strip(" '\""))]
