"""Special tokens of the decoder, which training, generation and export must agree on."""

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class DecoderTokens(NamedTuple):
    """The tokens around a target.

    Attributes:
        start: The first input of the decoder, which it never predicts.
        prefix: Tokens with which each target begins, such as that of its language; generation is forced to write them.
        end: Token with which each target ends.
    """

    start: int
    prefix: list[int]
    end: int


def decoder_tokens(tokenizer: "PreTrainedTokenizerFast", start: Optional[int]) -> DecoderTokens:
    """The tokens that a tokenizer puts around targets, as a decoder sees them.

    Tokenizers write the language of the target before it (mBART-50, NLLB) or after its end (mBART, which starts the
    decoder with it); some begin with a token that also starts the decoder (BERT), others do not (BART).

    Args:
        tokenizer: Its target language must be set.
        start: The `decoder_start_token_id` of the network; None if it has none.

    Raises:
        UserError: If the tokenizer has no token for the end or the start of texts.
    """
    before, after = target_ids(tokenizer)
    ends = [*after[:1], tokenizer.eos_token_id, tokenizer.sep_token_id]
    end = next((token for token in ends if token is not None), None)
    if end is None:
        raise UserError("the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json")
    if len(after) > 1:
        return DecoderTokens(after[-1], before, end)
    if start is None:
        start = before[0] if before else tokenizer.pad_token_id
    if start is None:
        raise UserError("the tokenizer has no padding token, with which decoders start: set pad_token in its config")
    return DecoderTokens(start, before[before[:1] == [start] :], end)


def target_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before and after a target."""
    full = tokenizer(text_target="a")["input_ids"]
    text = tokenizer(text_target="a", add_special_tokens=False)["input_ids"]
    begin = next(i for i in range(len(full)) if full[i : i + len(text)] == text)
    return full[:begin], full[begin + len(text) :]


def with_languages(tokenizer: Any, source: Optional[str], target: Optional[str]) -> dict[str, str]:
    """Options of a tokenizer for two languages.

    Raises:
        UserError: If it has no such languages.
    """
    for option, name in (("source_language", source), ("target_language", target)):
        if name is None:
            continue
        if not hasattr(tokenizer, "src_lang"):
            raise UserError(f"the tokenizer has no languages, but data.{option} is {name}: omit it")
        if name not in tokenizer.get_vocab():
            known = [token for token in tokenizer.all_special_tokens if "_" in token]
            raise UserError(
                f"data.{option} is {name!r}, which the tokenizer does not have: choose one of {', '.join(known)}"
            )
    return {key: name for key, name in (("src_lang", source), ("tgt_lang", target)) if name is not None}
