"""Trust: the options `--trust_remote_code` and `--trust_package`, which allow foreign code to run.

All commands have these options; they cannot be set in a config. Environment variables pass them to all processes.
"""

import argparse
import os
import re
import sys

from lm_lightning.errors import UserError

REMOTE_CODE = "LM_LIGHTNING_TRUST_REMOTE_CODE"  # environment variables, which all processes of a run inherit
PACKAGES = "LM_LIGHTNING_TRUST_PACKAGES"

HELP = """\
--trust_remote_code true: run the Python code of a model folder or Hub model; default: false
--trust_package NAME: let the config of a run import classes of this package; may be repeated"""


def trust_remote_code() -> bool:
    """Whether Python code in model folders may be run: only if the command line has `--trust_remote_code true`."""
    return os.environ.get(REMOTE_CODE) == "1"


def trusted_packages() -> list[str]:
    """Packages whose classes a run's own config may name, in addition to this project and its libraries."""
    return os.environ.get(PACKAGES, "").split(",")


def read_options() -> None:
    """Moves `--trust_remote_code true` and `--trust_package NAME` from `sys.argv` to the environment.

    Raises:
        UserError: If an option has no value or a wrong one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--trust_remote_code", choices=["true", "false"])
    parser.add_argument("--trust_package", action="append", default=[])
    try:
        given, sys.argv[1:] = parser.parse_known_args(sys.argv[1:])
    except argparse.ArgumentError as error:
        option = str(error.argument_name)
        needs = "true or false" if option == "--trust_remote_code" else "the name of a package"
        raise UserError(f"{option} must be {needs}") from None
    if given.trust_remote_code is not None:
        os.environ[REMOTE_CODE] = str(int(given.trust_remote_code == "true"))
    if packages := [name for names in given.trust_package for name in re.split(r"[\s,\[\]]+", names) if name]:
        if wrong := next((name for name in packages if not all(map(str.isidentifier, name.split(".")))), None):
            raise UserError(f"--trust_package is {wrong}, but must be the name of a package, such as my_package")
        os.environ[PACKAGES] = ",".join(packages)
