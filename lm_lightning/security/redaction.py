"""Redaction: removes the secrets of command lines and configs from the files and messages of a run.

The value of an option is secret if it is text and a word of the option's name is `key`, `token`, `password`, `secret`
or similar. The user info of a URL (`https://user:password@host`) and such parameters of its query are secret, too.
"""

import contextlib
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

REDACTED = "<redacted>"

WORDS = {"key", "keys", "apikey", "token", "tokens", "password", "passwd", "passphrase", "secret", "secrets"}
WORDS |= {"credential", "credentials", "authorization", "bearer", "pwd"}
NUMERIC = WORDS - {"key", "keys", "token", "tokens"}  # with these words, numbers are secrets, too
# With one of these words, an option is about tokens of a vocabulary, not about a secret
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
    # or about a number of tokens
    "num",
    "max",
    "min",
    "per",
    "heads",
    "dim",
    "size",
}

SHORTEST = 4  # minimum number of characters of the secrets that `scrub` removes from messages
_secrets: set[str] = set()  # the secrets that this process knows

_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_QUERY = re.compile(r"([?&]([\w.-]+)=)([^&#\s'\"]+)")


def is_secret(name: str, words: set[str] = WORDS) -> bool:
    """Whether the value of an option with this name, such as `trainer.logger.init_args.api_key`, is a secret."""
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2])
    parts = set(re.split(r"[^a-z0-9]+", last.lower()))
    joined = any(part.endswith(("password", "secret", "apikey", "authtoken", "accesstoken")) for part in parts)
    return (joined or bool(parts & words)) and not parts & VOCABULARY


def redact(value: Any, name: str = "") -> Any:
    """A copy of JSON-serializable data, such as a config, without its secrets.

    Args:
        value: The data.
        name: The key of the data in its parent.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return REDACTED if is_secret(name, NUMERIC) else value
    if not isinstance(value, str) or not value:
        return value
    return REDACTED if is_secret(name) else redact_text(value, name)


def secrets_of(value: Any, name: str = "") -> Iterator[str]:
    """The secrets in JSON-serializable data, which `redact` would replace."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from secrets_of(item, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_of(item, name)
    elif redact(value, name) == REDACTED:
        yield str(value)
    elif isinstance(value, str):
        if isinstance(content := parsed(value), (dict, list)):
            yield from secrets_of(content, name)
        yield from _USER_INFO.findall(value)
        yield from (secret for _, key, secret in _QUERY.findall(value) if is_secret(key))


def remember(value: Any, name: str = "") -> None:
    """Makes `scrub` remove the secrets in these options."""
    _secrets.update(secret for secret in secrets_of(value, name) if len(secret) >= SHORTEST and secret != REDACTED)


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
    """The value of an option, which may be a dict or list in JSON or YAML, without its secrets."""
    name = name.lstrip("-")
    if text and is_secret(name):
        return REDACTED
    value = parsed(text)
    redacted = without_user_info(text) if isinstance(value, str) else redact(value, name)
    return text if redacted == value else dumped(redacted)


def parsed(text: str) -> Any:
    """The dict or list that a JSON or YAML text represents; other text is returned unchanged."""
    if not re.match(r"\s*[{\[]", text):
        return text
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    import yaml  # (imported here, as every command imports this module)

    from lm_lightning.yaml_text import load

    with contextlib.suppress(yaml.YAMLError):
        return load(text)
    return text


def dumped(value: Any) -> str:
    """Returns text unchanged, and converts other data to JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def scrub(text: str, arguments: Sequence[str] = ()) -> str:
    """Removes from a message the secrets of the command line and of configs, which parsers may quote.

    Args:
        text: The message.
        arguments: The command line, in addition to the secrets that `remember` was given.
    """
    found = set(_secrets)
    for argument, redacted in zip(arguments, redact_arguments(arguments)):
        if argument != redacted:
            option, equals, value = argument.partition("=")
            name, value = (option, value) if equals and redacted.startswith(option + equals) else ("", argument)
            found |= {value} if redacted.endswith(REDACTED) else set(secrets_of(value, name))
    for secret in sorted(found, key=len, reverse=True):
        edges = (r"(?<!\w)" if secret[:1].isalnum() else "", r"(?!\w)" if secret[-1:].isalnum() else "")
        text = re.sub(edges[0] + re.escape(secret) + edges[1], REDACTED, text)
    return without_user_info(text)


def install() -> None:
    """Scrubs log records, warnings and tracebacks of this process."""
    remember_arguments(sys.argv)
    make_record, show = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make_record(*args, **kwargs)
        with contextlib.suppress(Exception):  # the arguments do not match the message; logging reports this
            message = made.getMessage()
            if (scrubbed := scrub(message)) != message:
                made.msg, made.args = scrubbed, ()
        return made

    def hook(kind: Any, error: Any, trace: Any) -> None:
        sys.stderr.write(scrub("".join(traceback.format_exception(kind, error, trace))))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **kwargs: scrub(show(*args, **kwargs))
    sys.excepthook = hook


def remember_arguments(arguments: Sequence[str]) -> None:
    """`remember` for a command line."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        option, equals, value = argument.partition("=")
        if argument.startswith("--"):
            remember(value if equals else following, option.lstrip("-"))
        else:
            remember(argument)


def find_redacted(config: Any, name: str = "") -> Iterator[str]:
    """The names of the options of a config that have redacted values."""
    if isinstance(config, dict):
        for key, item in config.items():
            yield from find_redacted(item, f"{name}.{key}" if name else str(key))
    elif isinstance(config, (list, tuple)):
        for item in config:
            yield from find_redacted(item, name)
    elif isinstance(config, str) and REDACTED in config:
        yield name
