"""`generate`: continues prompts with a causal language model."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from lm_lightning import hub
from lm_lightning.compat.transformers import hide_load_report
from lm_lightning.console import printable
from lm_lightning.errors import UserError, one_line
from lm_lightning.generation.sampling import Sampling, check
from lm_lightning.run import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def generate(
    model: str,
    prompt: str = "",
    prompts_file: Optional[str] = None,
    chat: bool = False,
    system: str = "",
    max_new_tokens: int = 200,
    greedy: bool = False,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Continues prompts with a causal language model.

    A text ends at one of the model's end tokens or after `max_new_tokens`. Other settings of the model's generation
    config, such as a temperature, are ignored; a message lists them.

    Args:
        model: Run folder, `from_pretrained` folder or Hub name.
        prompt: Text to continue; the output is printed as it is generated. Default: start a new document.
        prompts_file: File with one prompt per line, instead of `prompt`. One line of JSON is printed per prompt; the
            batch size does not affect the output.
        chat: Chat in the terminal; an empty line ends it.
        system: System message of the chat, if the model was trained with one.
        max_new_tokens: Maximum number of generated tokens.
        greedy: Always choose the most probable token instead of sampling.
        temperature: Sampling temperature: values below 1 favor probable tokens, values above 1 improbable ones.
        top_k: Sample from this number of most probable tokens; 0 means all.
        top_p: Sample from the smallest set of most probable tokens whose probabilities add up to this value.
        seed: The same seed and prompt give the same text.
        batch_size: Number of prompts of `prompts_file` that are processed at once.
        device: Device on which the model runs: `cpu`, `cuda`, `mps`, ...; `auto` chooses the fastest.
    """
    if (prompt != "") + (prompts_file is not None) + chat > 1:
        raise UserError("give only one of --prompt, --prompts_file and --chat")
    if system and not chat:
        raise UserError("--system is only for --chat true: omit it")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be 1 or more")
    sampling = Sampling(greedy, temperature, top_k, top_p, seed)
    check(1, max_new_tokens, sampling)
    prompts = read_prompts(prompts_file) if prompts_file is not None else {}
    network, tokenizer = load(model, device)  # first, so that a wrong path is reported without waiting for the imports

    from lm_lightning.generation.generation import describe_generation_config

    if message := describe_generation_config(network, tokenizer):
        say(message)
    if chat:
        chat_loop(network, tokenizer, max_new_tokens, sampling, system)
    elif prompts_file is not None:
        answer(network, tokenizer, prompts, batch_size, max_new_tokens, sampling)
    else:
        from lm_lightning.generation.generation import prompt_ids

        ids = prompt_ids(tokenizer, prompt)
        show(prompt)
        stream(network, tokenizer, ids, max_new_tokens, sampling)


def read_prompts(path: str) -> dict[str, str]:
    """The lines of a file, by `path:number`; none may be empty."""
    try:
        data = Path(path).read_bytes()
        prompts = data.decode("utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the prompts of {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8: convert the file to UTF-8"
        ) from error
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"{path}:{number}: the prompt is empty: remove the line")
    return {f"{path}:{number}": prompt.removesuffix("\r") for number, prompt in enumerate(prompts, 1)}


def load(model: str, device: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """The network and tokenizer of a run folder, a `from_pretrained` folder or a Hub name."""
    folder = str(model_folder(model)) if Path(model).expanduser().exists() else model
    import transformers

    from lm_lightning.data import tokenizer as tokenizers

    hide_load_report()
    if getattr(hub.config(folder), "is_encoder_decoder", False):
        raise UserError(f"{model} is an encoder-decoder, which writes a text for a text: use predict")
    network = hub.load(transformers.AutoModelForCausalLM, folder)
    named = network.config.architectures
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    trained_as: Any = getattr(transformers, name, None)  # a class in the model's own code is not in transformers
    is_network = isinstance(trained_as, type) and issubclass(trained_as, transformers.PreTrainedModel)
    if is_network and not trained_as.can_generate():  # loading may succeed, if the head shares the embedding's weights
        raise UserError(f"{model} is a {trained_as.__name__}, which cannot generate text: give a causal language model")
    if device == "auto":
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    network.config.pad_token_id = None  # there is a mask, so transformers need not search for padding tokens
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error, 200)
        raise UserError(f"--device {device} cannot be used on this machine ({reason}): use cpu or auto") from error
    return network, tokenizers.load(folder)


def say(text: str) -> None:
    """Prints a message that is not part of the generated text."""
    print(f"[{printable(text)}]", file=sys.stderr)


def show(text: str) -> None:
    """Prints generated text; control characters are escaped if the output is a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def stream(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> str:
    """Prints the generated text as it is generated, and returns it."""
    from lm_lightning.generation.generation import generate

    (text,) = generate(
        network, tokenizer, [ids], max_new_tokens, sampling, write=show, notice=say, names=["the prompt"]
    )
    show("\n")
    return text


def answer(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: dict[str, str],
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Prints a line of JSON for each prompt.

    Args:
        network: A causal network.
        tokenizer: Its tokenizer.
        prompts: Prompts by their names, which are used in messages.
        batch_size: Number of prompts that are processed at once.
        max_new_tokens: Maximum number of generated tokens.
        sampling: How tokens are chosen.
    """
    from lm_lightning.generation.generation import generate, prompt_ids, room

    rows = [(name, prompt, prompt_ids(tokenizer, prompt)) for name, prompt in prompts.items()]
    for name, _, ids in rows:  # all prompts, before text is generated for the first
        room(network, ids, max_new_tokens, name)
    for start in range(0, len(rows), batch_size):
        names, texts, tokens = map(list, zip(*rows[start : start + batch_size]))
        answers = generate(network, tokenizer, tokens, max_new_tokens, sampling, notice=say, names=names)
        for prompt, text in zip(texts, answers):
            show(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")


def chat_loop(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    max_new_tokens: int,
    sampling: Sampling,
    system: str,
) -> None:
    """Answers each line of the user, with the dialogue so far as context, until an empty line."""
    from lm_lightning.generation.chat import ChatFormat
    from lm_lightning.generation.generation import context_limit, prompt_ids
    from lm_lightning.networks import add_end_tokens

    chat_format = None if tokenizer.chat_template is None else ChatFormat(tokenizer)
    if chat_format is None:
        say("this model has no chat template: the dialogue is passed to it as lines of plain text")
    else:
        with contextlib.suppress(UserError):  # a template without an end token
            add_end_tokens(network, [chat_format.end_id])
    first = [{"role": "system", "content": system}] if system else []

    def tokens(turns: list[dict]) -> list[int]:
        if chat_format is None:
            return prompt_ids(tokenizer, "".join(turn["content"] + "\n" for turn in [*first, *turns]))
        return chat_format.prompt([*first, *turns])

    turns: list[dict] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"your input is not valid {error.encoding}: {error.reason}") from error
        if not line:
            return
        turns.append({"role": "user", "content": line})
        dropped = 0
        limit = context_limit(network)
        while len(tokens(turns)) + min(max_new_tokens, limit // 2) > limit and len(turns) > 2:
            turns, dropped = turns[2:], dropped + 2
        if len(tokens(turns)) >= limit:
            say(f"your input is too long: the maximum context length is {limit:.0f} tokens")
            turns.pop()
            continue
        if dropped:
            say(f"the context is full: the oldest {dropped} turns are dropped")
        turns.append(
            {"role": "assistant", "content": stream(network, tokenizer, tokens(turns), max_new_tokens, sampling)}
        )


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command

    command.run(generate)
