"""Secrets of command lines and configs are in nothing that a run leaves."""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from conftest import command, exists, needs, refusal

from lm_lightning.security.redaction import REDACTED, find_redacted, is_secret, redact, redact_arguments, scrub


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


# What a run leaves

MODULE = '''
import json, logging, warnings
from pathlib import Path
from typing import Any, Optional
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

class Remote(CSVLogger):
    """Sends what it is given to nowhere."""
    def __init__(self, save_dir: str, api_key: str, url: str, headers: dict[str, str], options: dict[str, Any]) -> None:
        super().__init__(save_dir, name="", version="remote")
        logging.getLogger("remote").warning("connecting to %s with key %s", url, api_key)
        warnings.warn(f"no answer to {headers}")
        print(f"secret of {len(api_key)} characters")

class Hook(Callback):
    def __init__(self, client_secret: str, uris: list[str], text: str, hf_token: str = "", passphrase: str = "",
                 password: Any = None, fails: bool = False) -> None:
        self.given, self.fails = [client_secret, uris, text, hf_token, passphrase, password], fails

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.fails:
            raise RuntimeError(f"no connection with {self.given}")
'''

SECRETS = [f"s3cr3t{number}value" for number in range(10)] + ["90210777"]
HOOK = {
    "class_path": "remote.Hook",
    "init_args": {
        "client_secret": SECRETS[0],
        "uris": ["https://example.org/plain", f"postgres://me:{SECRETS[1]}@db/x"],
        "text": json.dumps({"inner": [{"apiKey": SECRETS[2]}], "kept": 5}),
        "password": int(SECRETS[10]),
    },
}
REMOTE = {
    "class_path": "remote.Remote",
    "init_args": {
        "api_key": SECRETS[3],
        "url": f"https://me:{SECRETS[4]}@host/x?access_token={SECRETS[5]}&page=2",
        "headers": {"Authorization": f"Bearer {SECRETS[6]}", "Accept": "text"},
        "options": {"db": {"password": SECRETS[7]}},
    },
}
FLAGS = ["--trainer.callbacks.hf_token", SECRETS[8], f"--trainer.callbacks.passphrase={SECRETS[9]}"]


def found(*places: Path, texts: Sequence[str] = ()) -> list[str]:
    """Where secrets are, in names and contents of files and in texts."""
    places = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    contents = {str(file): file.read_bytes() for file in places if file.is_file()} | {
        f"text {number}": text.encode() for number, text in enumerate(texts)
    }
    assert contents
    return [
        f"{secret} in {name}"
        for name, content in contents.items()
        for secret in SECRETS
        if secret.encode() in content + name.encode()
    ]


@needs("reports")
@pytest.mark.slow
def test_secrets_are_in_nothing_that_a_run_leaves(recipe: Path, tmp_path: Path):
    (tmp_path / "remote.py").write_text(MODULE)
    secrets = tmp_path / "secrets.yaml"
    loggers = [REMOTE, {"class_path": "lm_lightning.callbacks.metrics_file.MetricsFile"}]
    if importlib.util.find_spec("wandb") and exists("tracking"):
        loggers.append({"class_path": "WandbRun"})
    secrets.write_text(yaml.safe_dump({"trainer": {"callbacks": [HOOK]}}))
    environment = os.environ | {"PYTHONPATH": f"{Path.cwd()}:{tmp_path}", "WANDB_MODE": "offline"}
    shared = ["--trainer.max_steps", 3, "--trainer.limit_val_batches", 1]
    given = ["--config", secrets, *FLAGS, *shared]
    logger = ["--trainer.logger", json.dumps(loggers)]

    fit = command("fit", "--config", recipe, *given, *logger, env=environment)
    assert fit.returncode == 0, fit.stderr
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    assert "connecting to https://<redacted>@host/x?access_token=<redacted>&page=2 with key <redacted>" in fit.stderr
    saved = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
    hook = saved["callbacks"][0]["init_args"]
    assert hook["uris"] == ["https://example.org/plain", "postgres://<redacted>@db/x"] and hook["password"] == REDACTED
    assert json.loads(hook["text"]) == {"inner": [{"apiKey": REDACTED}], "kept": 5}
    assert saved["logger"][0]["init_args"]["headers"] == {"Authorization": REDACTED, "Accept": "text"}

    refused = command("fit", "--config", run / "config.yaml", *shared, env=environment)
    for name in ("trainer.logger.init_args.api_key", "trainer.callbacks.init_args.uris"):
        assert name in refusal(refused)
    repeat = ["--config", run / "config.yaml", *given, *logger, "--trainer.callbacks.fails", "true"]
    repeated = command("fit", *repeat, "--name", "again", env=environment)
    assert repeated.returncode == 1 and "no connection with ['<redacted>'" in repeated.stderr

    trust = ["--trust_package", "remote"]
    unsaid = command("validate", run, *trust, env=environment)
    assert "trainer.callbacks.init_args.client_secret" in refusal(unsaid) and "api_key" not in refusal(unsaid)
    validate = command("validate", run, *given[:-4], *trust, env=environment)
    assert validate.returncode == 0, validate.stderr

    # of an older version, or another program
    (run / "config.1.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [HOOK], "logger": [REMOTE]}}))
    told = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(told | {"command": ["fit", *map(str, FLAGS), *logger]}))
    report = command("report", run, env=environment)
    assert report.returncode == 0, report.stderr
    (run / "config.1.yaml").unlink()
    (run / "environment.json").write_text(json.dumps(told))
    processes = (fit, refused, repeated, unsaid, validate, report)
    printed = [text for process in processes for text in (process.stdout, process.stderr)]
    assert not found(tmp_path / "runs", texts=printed)
    assert (run / "report.html").read_text().count("&lt;redacted&gt;") >= 12


@needs("tuning")
@pytest.mark.slow
def test_secrets_are_in_nothing_that_a_study_leaves(recipe: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("optuna")
    (tmp_path / "remote.py").write_text(MODULE)
    secrets, search = tmp_path / "secrets.yaml", tmp_path / "search.yaml"
    secrets.write_text(yaml.safe_dump({"trainer": {"callbacks": [HOOK]}}))
    flags = {"model.schedule.warmup_steps": {"choices": [1, 2]}}
    search.write_text(yaml.safe_dump({"trials": 1, "metric": "val/loss", "flags": flags}))
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}:{tmp_path}")
    configs = ["--config", recipe, "--config", secrets]
    out = cli("tune", *configs, *FLAGS, "--search", search, "--trainer.max_steps", 5)
    study = tmp_path / "runs" / "tiny-study"
    assert {"study.db", "config.yaml", "best.yaml"} <= {file.name for file in study.iterdir()}
    assert not found(study, texts=[out])
    assert list(study.glob("trial-000/*/model/config.json"))  # it had the secrets, else it would have been refused
    hook = yaml.safe_load((study / "best.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
    assert hook["client_secret"] == REDACTED
