"""Secrets of command lines and configs are in nothing that a run leaves."""

import pytest

from lm_lightning.redaction import find_redacted, is_secret, redact, redact_arguments, scrub


@pytest.mark.parametrize(
    "name", ["api_key", "apiKey", "trainer.logger.init_args.api-key", "token", "hf_token", "HF_TOKEN", "password"]
)
def test_names_of_secrets(name: str):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "pad_token",
        "eos_token_id",
        "monitor",
        "keyboard",
        "data.tokenizer.path",
        "additional_special_tokens",
    ],
)
def test_names_of_options_that_are_not_secret(name: str):
    assert not is_secret(name)


def test_a_config_keeps_all_but_its_secrets():
    config = {"logger": [{"init_args": {"api_key": "abc", "tokens": 5, "uri": "https://me:pw@host/x?token=t1&b=2"}}]}
    redacted = redact(config | {"pad_token": "<pad>", "lr": 1e-3, "secret": None})
    assert redacted == {
        "logger": [
            {
                "init_args": {
                    "api_key": "<redacted>",
                    "tokens": 5,
                    "uri": "https://<redacted>@host/x?token=<redacted>&b=2",
                }
            }
        ],
        "pad_token": "<pad>",
        "lr": 1e-3,
        "secret": None,
    }
    assert list(find_redacted(redacted)) == ["logger.init_args.api_key", "logger.init_args.uri"]


def test_a_command_line_keeps_all_but_its_secrets():
    arguments = [
        "fit",
        "--config",
        "a.yaml",
        "--x.api_key",
        "s1",
        "--x.token=s2",
        '--logger={"init_args": {"secret": "s3"}}',
    ]
    arguments += ["--logger", "{class_path: MLFlow, init_args: {tracking_uri: 'http://u:s4@h'}}", "--model.lr", "0.1"]
    redacted = redact_arguments(arguments)
    assert not [secret for secret in ("s1", "s2", "s3", "s4") if secret in " ".join(redacted)]
    assert redacted[:6] == ["fit", "--config", "a.yaml", "--x.api_key", "<redacted>", "--x.token=<redacted>"]
    assert redacted[-2:] == ["--model.lr", "0.1"]
    assert scrub("--x.api_key 's1' is not accepted, nor 's2'", arguments) == (
        "--x.api_key '<redacted>' is not accepted, nor '<redacted>'"
    )
