"""jsonargparse: patterns for the texts of its errors, from which this project makes its own messages.

Alternative: none. All its errors are `argparse.ArgumentError` with a text, without attributes for the option, the value
or the type.
"""

import re

# An option that a text mentions; the first one is the one that caused the error
KEY = re.compile(r'Parser key "([^"]+)"')
# An option that does not exist
UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: (.+)")
# A class that cannot be found or used
CLASS = re.compile(
    r"Expected a dot import path string: (?P<name>.*)"
    r"|given class_path '(?P<path>[^']+)':\s+(?P<why>No module named .*|module '.*' has no attribute .*|Import .*)"
    r"|(?:No module named|has no attribute) [^.\n]*\. Got value: (?P<value>\S+)"
    r"|Import path (?P<other>\S*) ?does not correspond to a subclass|Expected '(?P<kind>\S+)' to be a (?:sub)?class"
    r"|expects a function or a callable class: (?:Expected an import path|Dict must)"
)
# Required options that are missing
REQUIRED = re.compile(r"the following arguments are required: (.+)")
# A value of the wrong type
EXPECTED = re.compile(
    r"Expected a (?!path but|dot import)(?P<type>.*?)(?:\. Got value: (?P<value>.*?))?(?:\. Got value: .*)?$", re.M
)
# The types in the text of `TYPES` or `EXPECTED`
SUBTYPES = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[([^\]]*)\]|\b(\w+)\[|tuple with (\d+)")
TYPES = re.compile(r"Subtypes: (.*)")
GIVEN = re.compile(r"Given value: (.*)")
NESTED = re.compile(r"^NestedArg\(key=.*?, val='?(.*?)'?\)$")  # representation of some values
WITH_CLASS = re.compile(r"\. Got value: Namespace\(class_path='([^']+)'")
CONFIG = re.compile(r"Unable to load config '(.*)'")
ARGUMENT = re.compile(r"argument (?:-\w/)?(--[\w.]+)")
GROUP = re.compile(r"Group '([^']+)'")
CHOSEN = re.compile(r"class_path '([^']+)'")  # a class whose options are parsed


def tried_types(text: str) -> list[str]:
    """The errors of classes in a text that lists, for each type that an option accepts, why the value does not fit.

    Reasons that only state that the value has another type are omitted.
    """
    if not text.startswith("Does not validate against any of the Union"):
        return []
    tried = [line[4:] for line in text.splitlines() if line.startswith("  - ")]
    return [line for line in tried if not line.startswith(("Expected a", "Not a valid subclass"))]
