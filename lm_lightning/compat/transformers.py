"""transformers: messages that it has no switch for. (It is imported in the functions, since it takes seconds.)"""

import logging
import re


def hide_load_report() -> None:
    """Hides the table of tensors that `from_pretrained` and `save_pretrained` print, and their progress bars.

    What that table says (which tensors are new) is reported in one line where it matters. Alternative: a higher
    verbosity of `transformers.logging`, which would hide all other warnings, too.
    """
    from transformers.utils.logging import disable_progress_bar, get_logger

    disable_progress_bar()
    logger = get_logger("transformers.modeling_utils")
    if no_load_report not in logger.filters:
        logger.addFilter(no_load_report)


def no_load_report(record: logging.LogRecord) -> bool:
    """A filter of log records."""
    return "LOAD REPORT" not in record.getMessage()


def refused_settings(error: ValueError) -> list[str]:
    """The settings that `GenerationConfig.validate(strict=True)` has refused, from its message.

    Alternative: none, the error has no attributes.
    """
    text = str(error)
    return re.findall(r"^- `(\w+)`", text, re.MULTILINE) or re.findall(r"`(\w+)`", text)[:1]


def needs_remote_code(error: Exception) -> bool:
    """Whether `from_pretrained` has failed as the folder has Python code that it was not allowed to run.

    Alternative: none, it is a ValueError as others are.
    """
    return "trust_remote_code" in str(error)
