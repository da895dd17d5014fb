"""Files made by other people: opening one runs no code and touches nothing outside of its folder.

Each payload here is harmless: it would make a file named `harmed`, which must not exist afterwards.
"""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.commands import export
from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.models.adapter import from_record
from lm_lightning.models.export import ExtraFiles, changes_of
from lm_lightning.security import imports, untrusted
from lm_lightning.security.trust import PACKAGES as TRUST_PACKAGES


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "/etc/passwd", "a\\b", "a\nb", "\x1b[2J", "c:x", "nul", " ", "x" * 300, None, 3, "\ud800"],
)
def test_names_that_are_not_of_one_file_are_refused(name):
    with pytest.raises(UserError, match="--name is .*cannot be the name"):
        untrusted.plain_name(name, "--name")
    assert untrusted.plain_name("Größe_1.5-b", "--name") == "Größe_1.5-b"


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "link/x", "a//x"])
def test_a_relative_path_stays_in_its_folder(name: str, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UserError):
        untrusted.inside(folder, name, "modules.json")
    assert untrusted.inside(folder, "a/b", "modules.json") == folder / "a" / "b"


def test_only_networks_of_transformers_are_classes_of_a_checkpoint():
    assert untrusted.network_class("GPT2LMHeadModel").__name__ == "GPT2LMHeadModel"
    for name in ("pipeline", "os", "Trainer", "models.gpt2", "__doc__", "GPT2Config", "NoSuchModel", None, 7, ["x"]):
        with pytest.raises(UserError, match="no network class"):
            untrusted.network_class(name)


@pytest.mark.parametrize(
    "path",
    [
        "payload.Files",
        "os.system",
        "lm_lightning_evil.Files",
        "lm_lightning",
        "lm_lightning.__main__.main",
        "lm_lightning.models.export.__builtins__",
        "lm_lightning.files.os.system",  # an import of a module of the project
        "lm_lightning.models.adapter.Adapter",  # of the project, but another kind of class
        "lm_lightning.models.export.NoSuchClass",
        *("", "..", "payload", "payload\n.Files", None, 7, ["payload.Files"], {"payload": 1}),
    ],
)
def test_classes_that_a_checkpoint_records_are_of_the_project(path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "payload.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harmed')!r})\nclass Files: pass\n")
    (tmp_path / "lm_lightning_evil.py").write_text((tmp_path / "payload.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)  # of another test
    with pytest.raises(UserError, match="which is not one of lm_lightning: if you trust it|does not exist"):
        imports.recorded_class(path, ExtraFiles, "class of files")
    checkpoint = {"export_changes": {"a": path}, "callbacks": {"a": {}}}
    with pytest.raises(UserError):
        changes_of(checkpoint)
    if path != "lm_lightning.models.adapter.Adapter":
        with pytest.raises(UserError):
            from_record({"class": path, "options": {}})
    assert not (tmp_path / "harmed").exists() and "payload" not in sys.modules


def test_a_recorded_class_of_a_trusted_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "from lm_lightning.models.export import ExtraFiles\nclass Own(ExtraFiles): pass\nclass Other: pass\n"
    (tmp_path / "trusted_files.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="--trust_package trusted_files"):
        imports.recorded_class("trusted_files.Own", ExtraFiles, "class of files")
    monkeypatch.setenv(TRUST_PACKAGES, "trusted_files")
    assert issubclass(imports.recorded_class("trusted_files.Own", ExtraFiles, "class of files"), ExtraFiles)
    with pytest.raises(UserError, match="does not exist"):
        imports.recorded_class("trusted_files.Other", ExtraFiles, "class of files")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"options": {"rank": 1, "rnk": 8}},
            "trusted_own.Own does not accept .* rnk 8 .*unexpected .*'rnk'.*: use the",
        ),
        ({"options": {}}, "missing .*'rank'"),
        ({"options": {"rank": "8"}}, "rank '8' .*: use the version of this class that wrote the checkpoint"),
        ({"options": [1]}, "the checkpoint's class of files is recorded without its class and options"),
        ({"options": {"rank": 1}, "class": "trusted_own.Other"}, "trusted_own.Other does not exist"),
        ({"options": {"rank": 1}, "class": {}}, "which is not one of lm_lightning"),
    ],
)
def test_recorded_options_that_do_not_fit_their_class_are_refused(
    record: dict, message: str, finished: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = "from dataclasses import dataclass\nfrom lm_lightning.models import adapter, export\n"
    for base in ("adapter.Adapter", "export.ExtraFiles"):
        name = "Own" if "Files" in base else "OwnAdapter"
        code += f"@dataclass\nclass {name}({base}):\n    rank: int\n    def __post_init__(self): self.rank += 1\n"
    (tmp_path / "trusted_own.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trusted_own", raising=False)
    monkeypatch.setenv(TRUST_PACKAGES, "trusted_own")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for file in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["network"]["extra"] = {"class": "trusted_own.Own"} | record
        torch.save(checkpoint, file)
    with pytest.raises(UserError, match=f"^{run}/checkpoints/.*.ckpt: .*{message}"):
        cli("export", run)
    with pytest.raises(UserError, match=message.replace("Own ", "OwnAdapter ").replace("class of files", "adapter")):
        from_record({"class": "trusted_own.OwnAdapter"} | record)


def test_control_characters_are_escaped_for_terminals():
    text = "\x1b]0;title\x07 plain\n ü 漢 \u202e \x9b"
    assert printable(text) == "\\u001b]0;title\\u0007 plain\n ü 漢 \\u202e \\u009b"


def test_links_that_lead_out_of_a_run_folder_are_refused(tmp_path: Path):
    run, target = tmp_path / "run", tmp_path / "target"
    (run / "wandb").mkdir(parents=True)
    (run / "wandb" / "latest").symlink_to(run / "wandb")  # W&B makes such links
    logs = run / "wandb" / "offline-run-20261127_052451-dc116c1792" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "cache")  # as well
    untrusted.refuse_links(run)
    (logs / "debug.log").symlink_to(target)
    with pytest.raises(UserError, match="debug.log is a link to .*target"):
        untrusted.refuse_links(run)
    (logs / "debug.log").unlink()
    (run / "metrics.csv").symlink_to(target)
    with pytest.raises(UserError, match="metrics.csv is a link to .*target"):
        untrusted.refuse_links(run)


@pytest.mark.parametrize("name", ["{tmp}/harmed", "../harmed"])
def test_an_export_writes_no_file_that_the_checkpoint_names(name: str, tmp_path: Path):
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    files = {name.format(tmp=tmp_path): "text"}
    network = {"class": "BertModel", "config": config, "generation": None, "rows": 30522}
    network |= {"files": files, "embedding": {"files": files}}
    with pytest.raises(UserError, match="cannot be exported"):
        export.write({"network": network, "state_dict": {}, "tokenizer": None}, tmp_path, tmp_path / "model")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("path", ["os.system", "torch.nn.Linear", "lm_lightning.callbacks.dropout.NoDropout", 5])
def test_an_export_uses_no_other_class_that_a_checkpoint_names(path: object):
    from lm_lightning.models.export import changes_of

    with pytest.raises(UserError, match="the checkpoint.* callback "):
        changes_of({"export_changes": {"a": path}, "callbacks": {"a": {}}})


def test_a_resumed_run_removes_no_files_that_its_checkpoint_names_elsewhere(fit, tmp_path: Path):
    run = fit("--best.save_top_k", 2)
    victim, last = tmp_path / "victim.ckpt", run / "checkpoints" / "last.ckpt"
    victim.touch()
    checkpoint = torch.load(last, weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "best_k_models" in state:
            state["best_k_models"][str(victim)] = torch.tensor(1e9)
            state |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), str(victim))
    torch.save(checkpoint, last)
    assert fit("--best.save_top_k", 2, "--trainer.max_steps", 20, "--ckpt_path", "last") == run
    assert victim.exists()


def test_a_checkpoint_that_expands_is_refused(tmp_path: Path):
    torch.save({"state_dict": {}, "zeros": torch.zeros(1 << 20)}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for info in plain.infolist():
            bomb.writestr(info.filename, plain.read(info))
    with pytest.raises(UserError, match="compressed parts"):
        load_checkpoint(tmp_path / "bomb.ckpt")
