"""jsonargparse: the texts of its errors, from which ours are made.

Alternative: none. Its errors are all `argparse.ArgumentError` with one text, and have no attributes for the option, the
value or the type that it is about.
"""

import re

# The option that a text is about, and others within it
KEY = re.compile(r'Parser key "([^"]+)"')
# An option that there is not
UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: (.+)")
# A class that cannot be found or used
CLASS = re.compile(
    r"Expected a dot import path string: (?P<name>.*)"
    r"|given class_path '(?P<path>[^']+)':\s+(?P<why>No module named .*|module '.*' has no attribute .*|Import .*)"
    r"|(?:No module named|has no attribute) [^.\n]*\. Got value: (?P<value>\S+)"
    r"|Import path (?P<other>\S*) ?does not correspond to a subclass|Expected '(?P<kind>\S+)' to be a (?:sub)?class"
    r"|expects a function or a callable class: (?:Expected an import path|Dict must)"
)
# Options that must be given
REQUIRED = re.compile(r"the following arguments are required: (.+)")
# A value of another type
EXPECTED = re.compile(
    r"Expected a (?!path but|dot import)(?P<type>.*?)(?:\. Got value: (?P<value>.*?))?(?:\. Got value: .*)?$", re.M
)
# The types in the text of `TYPES` or `EXPECTED`
SUBTYPES = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[([^\]]*)\]|\b(\w+)\[|tuple with (\d+)")
TYPES = re.compile(r"Subtypes: (.*)")
GIVEN = re.compile(r"Given value: (.*)")
NESTED = re.compile(r"^NestedArg\(key=.*?, val='?(.*?)'?\)$")  # as which it may show a value
WITH_CLASS = re.compile(r"\. Got value: Namespace\(class_path='([^']+)'")
CONFIG = re.compile(r"Unable to load config '(.*)'")
ARGUMENT = re.compile(r"argument (?:-\w/)?(--[\w.]+)")
GROUP = re.compile(r"Group '([^']+)'")
CHOSEN = re.compile(r"class_path '([^']+)'")  # a class whose options are read


def tried_types(text: str) -> list[str]:
    """The reasons against the types of an option that accepts several, without those that a value of another type has.

    What is left are the errors of the classes themselves.
    """
    if not text.startswith("Does not validate against any of the Union"):
        return []
    tried = [line[4:] for line in text.splitlines() if line.startswith("  - ")]
    return [line for line in tried if not line.startswith(("Expected a", "Not a valid subclass"))]
