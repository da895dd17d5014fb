"""YAML 1.2: reads and writes it, and limits the size of what it reads, so that no file can exhaust the memory."""

import re
from typing import Any, Optional

import yaml

LARGEST = 10_000_000  # maximum number of characters with aliases expanded; each value counts as 10 more
DEEPEST = 100  # maximum number of levels


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2: keys are text, as they are written, and only true and false are booleans.

    YAML 1.1 reads `yes`, `no`, `on` and `off` as booleans, `12:30` as a number in base 60, `010` as 8, `2026-01-31` as
    a date and `1e-3` as text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (  # the first characters say which patterns are tried
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", "<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: If it is not YAML, has a key twice, is nested too deeply, or its aliases expand too far.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        refuse_expanding(node)
        refuse_duplicates(node)
        return loader.construct_document(node)
    except ValueError as error:  # such as a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


class Dumper(yaml.SafeDumper):
    """Quotes text that this loader or a YAML 1.1 loader would read as something else."""


for _letter, _patterns in Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _patterns:
        Dumper.add_implicit_resolver(_tag, _pattern, [_letter])


def dump(value: Any) -> str:
    """A value as YAML."""
    return yaml.dump(value, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def refuse_expanding(root: yaml.Node) -> None:
    """Refuses aliases that refer to themselves or that expand to much more than the text, and deep nesting.

    Otherwise a few lines could expand to a list of billions of items, or to an infinite one.
    """
    # Size (with aliases expanded) and depth of each node; None while its parts are counted
    known: dict[int, Optional[tuple[int, int]]] = {}
    waiting = [(root, False)]
    while waiting:
        node, counted = waiting.pop()
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        if counted:
            of_parts = [known[id(part)] or (1, 1) for part in parts]
            length = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
            size = 10 + length + sum(size for size, _ in of_parts)
            depth = 1 + max([0, *(depth for _, depth in of_parts)])
            if depth > DEEPEST:
                problem = f"it is nested more than {DEEPEST} levels deep"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            if size > LARGEST:
                problem = f"with its aliases (*) expanded, it has more than {LARGEST:,} characters"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            known[id(node)] = size, depth
        elif id(node) not in known:
            known[id(node)] = None
            waiting.append((node, True))
            waiting += [(part, False) for part in parts]
        elif known[id(node)] is None:
            problem = "an alias (*) refers to the value that contains it"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def refuse_duplicates(node: yaml.Node) -> None:
    """Refuses a mapping that has a key twice; the YAML library would silently keep the last one."""
    waiting, done = [node], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in done or isinstance(node, yaml.ScalarNode):  # (an alias is the same node again)
            continue
        done.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in seen and key.value != "<<":
                problem = f"the key {key.value!r} is given twice, in line {seen[key.value]} and in line {line}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = line
            waiting.append(value)


def explain_error(error: yaml.YAMLError) -> str:
    """Where and why a text is not valid YAML, in plain words; follows the name of the file in a message."""
    mark, text = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    advice = {
        "cannot start any token": "a value or key begins with a character that YAML reserves, or a line begins with a "
        "tab: indent with spaces, and put such values in quotes",
        "mapping values are not allowed": "there is a second colon in a line, or a line is indented wrongly: "
        "put values with a colon in quotes",
        "could not find expected": "a colon is missing after a key, or a quote or bracket is not closed",
        "undefined alias": "a value that begins with * must be in quotes",
        "while parsing": "a bracket or quote is not closed, or a line is indented wrongly",
        "did not find expected": "a bracket or quote is not closed, or a line is indented wrongly",
        "unacceptable character": "it contains a control character: is it a text file?",
        "control characters": "it contains a control character: is it a text file?",
    }
    words = next((words for part, words in advice.items() if part in str(error)), text)
    return (f", line {mark.line + 1}" if mark else "") + f": {words}"
