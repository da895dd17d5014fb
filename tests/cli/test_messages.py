"""Messages: every option that a message or the README names is one that is accepted."""

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator

import pytest
from conftest import ROOT, command, needs, optional
from jsonargparse import ArgumentParser

from lm_lightning.__main__ import commands
from lm_lightning.cli import app as fit_command
from lm_lightning.cli import explain
from lm_lightning.data.corpus import Corpus

FREE = ("model.optimizer.", "model.network.", "data.corpora.")  # of the class or network that is chosen, or named
SOURCES = [*(ROOT / "lm_lightning").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SOURCES += (ROOT / "configs").glob("*.yaml")


def options_of_chosen(kind: type, section: str) -> set[str]:
    """The options of the classes that an option of a class chooses, such as `model.adapter.rank`."""
    found = set()
    for name, annotation in typing.get_type_hints(kind.__init__).items():
        for base in (annotation, *typing.get_args(annotation)):
            if isinstance(base, type) and base.__module__.startswith("lm_lightning."):
                for chosen in explain.subclasses(base).values():
                    found |= {f"{section}.{name}.{own}" for own in inspect.signature(chosen).parameters}
    return found


@pytest.fixture(scope="module")
def accepted() -> set[str]:
    """The options of all classes of data and models, without the dashes."""
    names = set()
    for section, base in BASES.items():
        for kind in explain.subclasses(base).values():
            if kind.__module__.startswith("lm_lightning."):
                parser = ArgumentParser(exit_on_error=False)
                parser.add_class_arguments(kind, section, fail_untyped=False)
                names |= set(parser.get_defaults().keys())
                names |= options_of_chosen(kind, section)
        names |= options_of_chosen(base, section)
    assert {"data.tables.encoding_errors", "data.corpus.paths", "data.columns.text", "model.pretrained"} <= names
    return names


@needs("finetuning", "lora")
def test_options_in_messages_are_accepted(accepted: set[str]):
    wrong = []
    for file in SOURCES:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            for name in re.findall(r"--((?:data|model)\.[a-z_]+(?:\.[a-z_]+)*)", line):
                known = any(name == option or option.startswith(f"{name}.") for option in accepted)
                if not (known or name.startswith(FREE) or name.endswith(".help")):
                    wrong.append(f"{file.relative_to(ROOT)}:{number}: --{name}")
    assert not wrong


def test_messages_of_shared_readers_name_options_of_corpora_and_tables():
    tables_class = optional("finetuning.tables.Tables")
    readers = [ROOT / "lm_lightning" / "data" / f"{name}.py" for name in ("formats", "reading")]
    readers += (ROOT / "lm_lightning").glob("tasks/*/squad.py")
    source = "".join(file.read_text(encoding="utf-8") for file in readers)
    named = set(re.findall(r"(?:\{options\.prefix\}|\{self\.prefix\}|\{prefix\}| or )\.([a-z_]+)", source))
    corpus, tables = ({option.name for option in dataclasses.fields(kind)} for kind in (Corpus, tables_class))
    assert {"encoding", "encoding_errors", "delimiter", "quoting"} <= named
    assert named <= corpus
    assert named - tables == {"max_line"}, "read as a corpus only"


# Where a message is raised says which classes or which command it is about.

BASES = {"model": fit_command.LanguageModule, "data": fit_command.LightningDataModule}
CORPORA = ("PretrainingData", "MaskedData")
CLASSES = {  # of modules that others import for something else than what the messages are about
    "data/builtin.py": CORPORA,
    "data/corpus.py": CORPORA,
    "data/documents.py": CORPORA,
    "data/filtering.py": CORPORA,
    "data/tagging.py": ("TaggingData",),  # RoleData has a scheme of its own: see below
    "embedding.py": ("SentenceEncoder",),
}
OPTION = re.compile(r"(?<![\w./-])(--[a-z]\w+(?:\.[a-z]\w*)*|(?:model|data|trainer|best|last)(?:\.[a-z]\w*)+)(?![\w/])")


def refusals() -> Iterator[tuple[str, int, str]]:
    """Where the package raises a `UserError`, with all text in it: module, line, text."""
    for file in sorted((ROOT / "lm_lightning").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "UserError":
                parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                yield str(file.relative_to(ROOT / "lm_lightning")), node.lineno, " ".join(parts)


def imported(module: str, seen: set[str]) -> set[str]:
    """The files of the package that a module imports, with those that these import."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    name = module.removeprefix("lm_lightning.").replace(".", "/") + ".py"
    if name in seen or not file.is_file():
        return seen
    seen.add(name)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm_lightning"):
            for found in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                imported(found, seen)
    return seen


def classes_of(section: str) -> dict[str, type]:
    """The classes of models or data that a user can choose."""
    return explain.own_classes(BASES[section])


@needs("finetuning")
def test_each_message_names_options_of_its_own_classes():
    options, files = {}, {}
    for section in BASES:
        for name, kind in classes_of(section).items():
            options[name] = {*explain.options_of(kind, section)}
            options[name] |= options_of_chosen(kind, section) | options_of_chosen(BASES[section], section)
            files[name] = imported(kind.__module__, set())
    wrong, checked = [], 0
    for file, line, text in refusals():
        for name in {found.removeprefix("--") for found in OPTION.findall(text)}:
            section = name.partition(".")[0]
            if section not in BASES or "." not in name or name.startswith(FREE):
                continue
            kinds = classes_of(section)
            users = CLASSES.get(file) or [kind for kind in kinds if file in files[kind]] or list(kinds)
            users = [kind for kind in users if kind in kinds] or list(kinds)
            checked += 1
            if file.startswith("models/"):  # n-grams have no network whose options could be refused
                users = [kind for kind in users if kind != "NGramLM"]
            has = [kind for kind in users if any(o == name or o.startswith(f"{name}.") for o in options[kind])]
            if not has or (
                len(has) < len(users) and file.split("/")[0] == ("models" if section == "model" else section)
            ):
                wrong.append(f"{file}:{line}: {name} is no option of {', '.join(sorted(set(users) - set(has)))}")
    assert not wrong and checked > 60, "\n".join(wrong)


def flags_in(text: str) -> set[str]:
    """The flags that a help names, without the dashes."""
    return set(re.findall(r"--([a-z][\w.]*[\w])", text))


@pytest.fixture
def flags_of_commands(cli: Callable[..., str], capsys: pytest.CaptureFixture) -> dict[str, set[str]]:
    """The flags in the help of each command, without the dashes; those in the help of all commands are in each."""
    found = {}
    lines = [line for line in command("--help").stdout.splitlines() if line.startswith("--")]
    everywhere = flags_in("\n".join(lines))
    assert everywhere == {"trust_remote_code", "trust_package"}
    for name in commands():
        with pytest.raises(SystemExit):
            cli(name, "--help")
        found[name] = flags_in(capsys.readouterr().out) | everywhere
    return found


def test_each_message_names_flags_of_its_own_command(flags_of_commands: dict[str, set[str]]):
    runs = ("fit", "validate", "test", "predict")
    fits = set.union(*(flags_of_commands[name] for name in runs))
    modules = {name: f"{module.replace('.', '/')}.py" for name, (module, _) in commands().items()}
    wrong, checked = [], 0
    for file, line, text in refusals():
        path = f"lm_lightning/{file}"
        folder = path.rpartition("/")[0]
        owners = [name for name, module in modules.items() if module == path]
        owners = owners or [name for name, module in modules.items() if module.rpartition("/")[0] == folder]
        # a message may send the user to another command
        named = [name for name in commands() if re.search(rf"\b{name} ", text)]
        own = set().union(*(flags_of_commands[name] for name in owners + named))
        if not owners or {"tune", "verify"} & {*owners} or folder.startswith("lm_lightning/tasks/"):
            own |= fits  # whose flags tune and verify pass on
        for name in OPTION.findall(text):
            flag = name.removeprefix("--")
            if flag.startswith(("model.", "data.")):
                continue
            checked += 1
            if flag not in own:
                wrong.append(f"{file}:{line}: {name} is no flag of {owners}")
    assert not wrong and checked > 20, wrong
