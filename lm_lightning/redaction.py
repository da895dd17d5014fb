"""Redaction: what a run leaves holds no secrets, although command lines and configs may.

An option is secret if a word of its name is `key`, `token`, `password`, `secret` or similar, and its value a text; so
is the user info of a URL (`https://user:password@host`) and such a parameter of its query.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

REDACTED = "<redacted>"

WORDS = {"key", "keys", "apikey", "token", "tokens", "password", "passwd", "passphrase", "secret", "secrets"}
WORDS |= {"credential", "credentials"}
# ... of which these are names of tokens in a vocabulary, not secrets
VOCABULARY = {
    "bos",
    "eos",
    "pad",
    "unk",
    "sep",
    "cls",
    "mask",
    "image",
    "audio",
    "video",
    "special",
    "additional",
    "new",
}

_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_QUERY = re.compile(r"([?&]([\w.-]+)=)([^&#\s'\"]+)")


def is_secret(name: str) -> bool:
    """Whether an option of a name, such as `trainer.logger.init_args.api_key`, holds a secret."""
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2])
    words = set(re.split(r"[^a-z0-9]+", last.lower()))
    return bool(words & WORDS) and not words & VOCABULARY


def redact(value: Any, name: str = "") -> Any:
    """A copy of JSON-able data, such as a config, without its secrets.

    Args:
        value: The data.
        name: The name that it has within its parent.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return REDACTED if is_secret(name) else without_user_info(value)


def without_user_info(text: str) -> str:
    """A text without the user info and the secret parameters of the URLs in it."""
    text = _USER_INFO.sub(REDACTED, text)
    return _QUERY.sub(lambda match: match[1] + (REDACTED if is_secret(match[2]) else match[3]), text)


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without its secrets, in `--option value`, `--option=value`, and in JSON or YAML values."""
    found, name = [], ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if argument.startswith("--") and (equals or not re.search(r"\s", argument)):
            found.append(option + equals + redact_text(value, option) if equals else argument)
            name = "" if equals else argument
        else:
            found.append(redact_text(argument, name))
            name = ""
    return found


def redact_text(text: str, name: str) -> str:
    """The value of an option on a command line, which may be a dict or list in JSON or YAML, without its secrets."""
    value: Any = text
    if re.match(r"\s*[{\[]", text):
        import yaml  # (only here, as this module is imported by each start)

        with contextlib.suppress(yaml.YAMLError, RecursionError):
            value = yaml.safe_load(text)
    if isinstance(value, str):
        return redact(text, name.lstrip("-"))
    redacted = redact(value, name.lstrip("-"))
    return text if redacted == value else json.dumps(redacted, ensure_ascii=False, default=str)


def scrub(text: str, arguments: Sequence[str]) -> str:
    """A message without the secrets of a command line, which a parser may quote."""
    for argument, redacted in zip(arguments, redact_arguments(arguments)):
        if argument != redacted:
            secret = argument.partition("=")[2] if redacted.endswith(f"={REDACTED}") else argument
            text = text.replace(secret, REDACTED)
    return without_user_info(text)


def find_redacted(config: Any, name: str = "") -> Iterator[str]:
    """The names of the options of a config whose values were redacted."""
    if isinstance(config, dict):
        for key, item in config.items():
            yield from find_redacted(item, f"{name}.{key}" if name else str(key))
    elif isinstance(config, (list, tuple)):
        for item in config:
            yield from find_redacted(item, name)
    elif isinstance(config, str) and REDACTED in config:
        yield name


@contextlib.contextmanager
def redacted_command_line() -> Iterator[None]:
    """Shows libraries that record `sys.argv` a command line without secrets."""
    arguments = sys.argv
    sys.argv = redact_arguments(arguments)
    try:
        yield
    finally:
        sys.argv = arguments
