"""transformers: messages that cannot be switched off. (Functions import it, as the import takes seconds.)"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_lightning.errors import UserError, one_line


def hide_load_report() -> None:
    """Hides the table of tensors that `from_pretrained` and `save_pretrained` print, and their progress bars.

    The content of the table (which tensors are new) is printed in one line where it matters. Alternative: a higher
    verbosity of `transformers.logging`, which would also hide all other warnings.
    """
    from transformers.utils.logging import disable_progress_bar, get_logger

    disable_progress_bar()
    logger = get_logger("transformers.modeling_utils")
    if no_load_report not in logger.filters:
        logger.addFilter(no_load_report)


def no_load_report(record: logging.LogRecord) -> bool:
    """Filter for log records."""
    return "LOAD REPORT" not in record.getMessage()


def refused_settings(error: ValueError) -> list[str]:
    """The settings that `GenerationConfig.validate(strict=True)` refuses, read from its message.

    Alternative: none, the error has no attributes.
    """
    text = str(error)
    return re.findall(r"^- `(\w+)`", text, re.MULTILINE) or re.findall(r"`(\w+)`", text)[:1]


def network_error(error: Exception) -> str:
    """Why a network cannot be created, in one sentence, without the names of the hundreds of networks that can be.

    Alternative: the private `_model_mapping` of the auto classes.
    """
    text = one_line(error, 300)
    found = re.search(r"^Unrecognized configuration class <class '[\w.]*?(\w+)'> for .*AutoModel: (\w+)", text)
    if found:
        return f"transformers has no {found[2]} with a {found[1]}: choose another model_type or other weights"
    return text


def needs_remote_code(error: Exception) -> bool:
    """Whether `from_pretrained` failed because the folder has Python code that it was not allowed to run.

    Alternative: none, it is a ValueError like other errors.
    """
    return "trust_remote_code" in str(error)


def render_chat(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], template: str, prompt: bool, markers: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation as `apply_chat_template` does, which returns places only as tokens of the full text.

    Args:
        tokenizer: Its special tokens are variables of the template.
        turns: The conversation.
        template: The chat template.
        prompt: Whether to add the generation prompt.
        markers: Whether the template has generation markers.

    Returns:
        The text; the places (start, end) of what is between generation markers.

    Raises:
        UserError: If the template has an error, or refuses the conversation.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, places = render_jinja_template(
            [list(turns)],
            chat_template=template,
            return_assistant_tokens_mask=markers,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"the chat template cannot render the conversation ({' '.join(str(error).split())[:200]}): fix the "
            "conversation, or give another template with --data.chat_template"
        ) from error
    return texts[0], [tuple(place) for place in places[0]] if markers else []
