"""Masking of personal data."""

import re
from typing import Any

from lm_lightning.data.filter import Changed, Document, Filter, Verdict

EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])")
# International numbers with a plus, numbers with an area code in parentheses, and 3-3-4 digits as in North America.
# Other numbers look too similar to years, ISBNs and sums of money.
PHONE = re.compile(
    r"(?<![\w+.,/-])(?:"
    r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|\(0?\d{2,4}\) ?\d{3,4}[ .-]?\d{3,4}"
    r"|\d{3}[ .-]\d{3}[ .-]\d{4}"
    r")(?![\w-]|[.,]\d)"
)
AROUND = 40  # characters around a mask in an example


class MaskPersonalData(Filter):
    """Replaces e-mail addresses and phone numbers by masks; no document is removed.

    Patterns cannot find all of them: local numbers without an area code in parentheses stay, for example.

    Args:
        emails: What replaces an e-mail address; null leaves them.
        phones: What replaces a phone number; null leaves them.
        options: Arguments of `Filter`.
    """

    def __init__(self, emails: str | None = "[email]", phones: str | None = "[phone]", **options: Any) -> None:
        super().__init__(**options)
        self.emails, self.phones = emails, phones

    def judge(self, document: Document) -> Verdict:
        text, counts, example = document.text, {}, ""
        masks = (("e-mail addresses", EMAIL, self.emails, "@"), ("phone numbers", PHONE, self.phones, None))
        for kind, pattern, mask, needed in masks:
            if mask is None or (needed and needed not in text):
                continue
            text, count = pattern.subn(mask.replace("\\", r"\\"), text)
            if count:
                counts[kind] = count
                start = text.find(mask) if mask else 0
                example = text[max(0, start - AROUND) : start + len(mask) + AROUND]
        return Changed(text, counts, example) if counts else None
