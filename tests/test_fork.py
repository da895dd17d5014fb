"""`scripts/fork.py` makes projects that work: all modules import, a recipe trains, the tests are collected."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from forks import python

sys.path.insert(0, str(ROOT / "scripts"))
import fork  # noqa: E402

CLASS = re.compile(r"^class ([A-Z]\w+)", re.M)
# A process that has imported what projects use, but nothing of this one, and forks for each line: FOLDER, NAME, RECIPE
WARM = """
import contextlib, gc, importlib, json, os, signal, sys, zlib
from pathlib import Path
import pytest
LIBRARIES = ["lightning.pytorch", "transformers.models.gpt2.modeling_gpt2", "transformers.models.bert.modeling_bert"]
LIBRARIES += ["torch.utils.tensorboard", "hypothesis", "datasets", "peft", "bitsandbytes", "torchao", "optuna", "wandb"]

def check(folder, name, recipe):
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in ("", os.getcwd()))]
    os.environ["PYTHONPATH"] = folder
    os.chdir(folder)
    sys.pycache_prefix = folder + ".pyc"  # what another project at this place has compiled is used again
    for file in Path(folder).rglob("*.py"):  # if the content is the same
        os.utime(file, (zlib.crc32(file.read_bytes()),) * 2)
    package = importlib.import_module(name)
    assert package.__file__.startswith(folder), package.__file__
    for file in sorted(Path(folder, name).rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if parts[-1] != "__main__":
            importlib.import_module(".".join(parts[: -1 if parts[-1] == "__init__" else None]))
    main = importlib.import_module(name + ".__main__")
    sys.argv = [name, "--help"]
    main.main()
    options = ["-q", "--assert=plain", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    assert pytest.main([*options, "tests", "-k", f"exports[{recipe}]"]) == 0, "a test fails or is not collected"

def run(job, log):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        signal.alarm(500)
        check(*job)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for library in LIBRARIES:
    with contextlib.suppress(ImportError):
        importlib.import_module(library)
gc.disable()
for line in sys.stdin:
    *job, log = json.loads(line)
    child = sys.platform == "linux" and os.fork()
    status = os.waitpid(child, 0)[1] if child else run(job, log)
    if child or sys.platform != "linux":
        print(status, file=answers, flush=True)
    if not child:
        os._exit(status)
"""


@pytest.fixture(scope="session")
def warm() -> Iterator[Callable[[Path, str], None]]:
    """Imports everything in a project, trains a recipe of it, and collects its tests."""
    with contextlib.ExitStack() as stack:
        started: list[subprocess.Popen] = []

        def check(folder: Path, recipe: str) -> None:
            if not started or started[-1].poll() is not None:
                words = [python("transformers"), "-c", WARM]
                process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                started.append(stack.enter_context(process))
            process, log = started[-1], folder.with_suffix(".log")
            print(json.dumps([str(folder), folder.name, recipe, str(log)]), file=process.stdin, flush=True)
            status = process.stdout.readline().strip()  # type: ignore[union-attr]
            assert status == "0", f"status {status}: {log.read_text()[-6000:] if log.exists() else ''}"
            if sys.platform != "linux":  # where it does not fork
                process.wait()

        yield check


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the template as it is here, all of it committed."""
    folder = tmp_path_factory.mktemp("template") / "lm_lightning"
    unwanted = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", "runs", "wandb", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=unwanted, symlinks=True)
    for words in (["init"], ["add", "--all"], ["commit", "--message", "the template"]):
        git(folder, *words)
    return folder


def git(folder: Path, *arguments: str) -> str:
    """What a git command prints."""
    user = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    return subprocess.run(
        ["git", *user, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def run(template: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs the script in a checkout."""
    words = [sys.executable, template / "scripts" / "fork.py", *arguments]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=template)


@pytest.fixture
def make(template: Path) -> Callable[..., Path]:
    """Makes a project `my_lm` and checks that nothing of what was removed is mentioned in it."""

    def make(keep: list[str]) -> Path:
        folder = template.parent / "my_lm"  # the same for all, see `WARM`
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)
        result = run(template, folder, *([] if keep == fork.CHOICES else ["--keep", ",".join(keep)]))
        assert result.returncode == 0, result.stderr
        mentions(folder, keep)
        return folder

    return make


def mentions(folder: Path, keep: list[str]) -> None:
    """Checks that a project names nothing that it does not have, nor the template, and that its pages have no gaps."""
    kept = fork.features(",".join(keep))
    texts = {
        path: path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (".py", ".md", ".yaml")
    }
    patterns = {suffix: set(gone(kept)) for suffix in (".py", ".md", ".yaml")}
    own = {name for path, text in texts.items() if folder / "my_lm" in path.parents for name in CLASS.findall(text)}
    for name in classes(set(fork.FEATURES) - set(kept)) - own:  # in Python, they may be examples in a sentence
        patterns[".md"].add(name if re.search("[a-z][A-Z]", name) else f"`{name}`")  # else it may be a word
        patterns[".yaml"] |= {name} if re.search("[a-z][A-Z]", name) else set()
    found = {
        f"{path.relative_to(folder)}:{number}: {match[0]}"
        for path, text in texts.items()
        for pattern in [re.compile("|".join(rf"(?<![\w.]){re.escape(name)}(?!\w)" for name in patterns[path.suffix]))]
        for number, line in enumerate(text.splitlines() if pattern.pattern else [], start=1)
        if (match := pattern.search(line))
    }
    assert not found, "\n".join(sorted(found))
    assert not any(re.search("lm.lightning", text, re.I) for text in texts.values())
    unguarded(folder, kept, texts)
    extras = set(re.findall(r"^(\w+) = \[", (folder / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    for path, text in texts.items():
        named = ",".join(
            re.findall(r"\.\\?\[(\w[\w,]*)\\?\]", text) + re.findall(r'\bpackage\("[^)]*"(\w+)"\s*\)', text)
        )
        assert not set(filter(None, named.split(","))) - extras, (path, named)
    for path in folder.rglob("*.md"):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", texts[path])
        assert all((path.parent / link).exists() for link in links), (path, links)
        assert texts[path] == fork.without_empty(texts[path]), path


def unguarded(folder: Path, kept: list[str], texts: dict[Path, str]) -> None:
    """Checks that a test file which chooses a class that was removed also names its package, as `needs` does."""
    from lm_lightning.features import features

    only_compared = ("conftest.py", "reading.py", "test_configs.py", "test_messages.py")
    for package in features().keys() - {fork.FEATURES[name].package for name in kept}:
        modules = [find_spec(name) for name in features()[package].classes]
        sources = [Path(module.origin).read_text(encoding="utf-8") for module in modules if module and module.origin]
        names = [name for source in sources for name in CLASS.findall(source)]
        choices = re.compile(rf"""["'=]({"|".join(names) or "(?!)"})["']""")
        for path, text in texts.items():
            if "tests" in path.relative_to(folder).parts and path.name not in only_compared:
                assert not choices.search(text) or f'"{package}' in text, (path, choices.search(text), package)


def gone(kept: list[str]) -> set[str]:
    """Modules, paths and commands of the features that are not kept."""
    from lm_lightning.features import features

    names: set[str] = set()
    for feature in (feature for name, feature in fork.FEATURES.items() if name not in kept):
        names |= {f"my_lm.{feature.package}", f"my_lm/{feature.package.replace('.', '/')}"}
        names |= {path for pattern in feature.files for path in [pattern.rstrip("*/")] if "/" in path}
        if feature.package in features():
            names |= {f"-m my_lm {command}" for command in features()[feature.package].commands}
    return names


def classes(names: set[str]) -> set[str]:
    """The names of the classes of features."""
    folders = [ROOT / "lm_lightning" / fork.FEATURES[name].package.replace(".", "/") for name in names]
    sources = [file.read_text(encoding="utf-8") for folder in folders for file in folder.rglob("*.py")]
    return {name for source in sources for name in CLASS.findall(source)}


@pytest.fixture
def check(warm: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    """Checks that a project works (see `warm`), and its contracts of imports and its format."""

    def check(folder: Path, recipe: str) -> None:
        warm(folder, recipe)
        tools = {"lint-imports": [[]], "ruff": [["check", "."], ["format", "--check", "."]]}
        for tool, calls in tools.items():
            for words in calls if shutil.which(tool) else []:
                result = subprocess.run([tool, *words], capture_output=True, text=True, cwd=folder)
                assert result.returncode == 0, result.stdout + result.stderr

    return check


@pytest.mark.slow
def test_everything_is_kept(make: Callable[..., Path], check: Callable[[Path, str], None]):
    check(make(fork.CHOICES), "sentiment")


def test_gpt_alone(make: Callable[..., Path], check: Callable[[Path, str], None]):
    folder = make(["gpt"])
    check(folder, "gpt")
    lines, all_lines = (
        sum(len(file.read_text(encoding="utf-8").splitlines()) for file in package.rglob("*.py"))
        for package in (folder / "my_lm", ROOT / "lm_lightning")
    )
    assert lines < 0.52 * all_lines


@pytest.mark.slow
def test_bert_and_classification(make: Callable[..., Path], check: Callable[[Path, str], None]):
    folder = make(["bert", "classification"])
    check(folder, "bert")
    check(folder, "sentiment")


@pytest.mark.slow
@pytest.mark.parametrize("feature", fork.CHOICES)
def test_each_feature_can_be_removed(feature: str, make: Callable[..., Path], check: Callable[[Path, str], None]):
    without = {feature, *fork.FEATURES[feature].needed_by}
    check(make([name for name in fork.CHOICES if name not in without]), "gpt")


@pytest.mark.slow
def test_all_features_can_be_removed(make: Callable[..., Path], check: Callable[[Path, str], None]):
    check(make([]), "gpt")


@pytest.mark.slow
def test_first_commit_names_the_template_and_the_options(template: Path, make: Callable[..., Path]):
    folder = make(["gpt", "lora"])
    body = git(folder, "log", "--format=%B")
    assert git(template, "rev-parse", "HEAD") in body and "--name my_lm --keep gpt,lora" in body
    assert git(folder, "rev-list", "--count", "HEAD") == "1" and not git(folder, "status", "--porcelain")
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    assert 'name = "my_lm"' in text and 'my-lm = "my_lm.__main__:main"' in text
    assert re.search(r"^lora = ", text, re.M) and not re.search(r"^(compress|bert|wandb) = ", text, re.M)
    assert '"my_lm[data,plot,lora,scores]"' in text
    assert not (folder / "scripts" / "fork.py").exists()


def test_later_changes_of_the_template_are_merged(template: Path, tmp_path: Path):
    folder, later = tmp_path / "my_lm", tmp_path / "later"
    assert run(template, folder, "--keep", "gpt").returncode == 0
    (folder / "my_lm" / "losses.py").write_text("# mine\n" + (folder / "my_lm" / "losses.py").read_text())
    git(folder, "commit", "--all", "--message", "a change of my own")
    git(tmp_path, "clone", "--quiet", str(template), str(later))
    for name in ("losses.py", "tuning/tune.py"):
        with open(later / "lm_lightning" / name, "a", encoding="utf-8") as file:
            file.write("\n# lm_lightning has changed\n")
    git(later, "commit", "--all", "--message", "a change of the template")
    for message in ("next: ", "has all of the template already"):
        result = run(later, folder, "--update")
        assert result.returncode == 0 and message in result.stdout, result.stderr
        git(folder, "merge", "--no-edit", "template")
    text = (folder / "my_lm" / "losses.py").read_text(encoding="utf-8")
    assert text.startswith("# mine\n") and text.endswith("# my_lm has changed\n")
    assert not (folder / "my_lm" / "tuning").exists() and not git(folder, "status", "--porcelain")
    assert git(later, "rev-parse", "HEAD") in git(folder, "log", "--format=%B", "template")


def test_conflicts_are_those_of_lines_that_both_have_changed(template: Path, tmp_path: Path):
    folder, later = tmp_path / "my_lm", tmp_path / "later"
    assert run(template, folder, "--keep", "gpt").returncode == 0
    git(tmp_path, "clone", "--quiet", str(template), str(later))
    for project, rate in ((folder, "1.0e-3"), (later, "2.0e-3")):
        recipe = project / "configs" / "gpt.yaml"
        text = recipe.read_text(encoding="utf-8")
        assert "lr: 3.0e-3" in text
        recipe.write_text(text.replace("lr: 3.0e-3", f"lr: {rate}"), encoding="utf-8")
    git(folder, "rm", "--quiet", "scripts/kill.py")
    for name in ("scripts/kill.py", "lm_lightning/losses.py"):
        with open(later / name, "a", encoding="utf-8") as file:
            file.write("# later\n")
    for project in (folder, later):
        git(project, "commit", "--all", "--message", "a change")
    assert run(later, folder, "--update").returncode == 0
    with pytest.raises(subprocess.CalledProcessError):
        git(folder, "merge", "template")
    assert git(folder, "status", "--porcelain").splitlines() == [
        *("UU configs/gpt.yaml", "M  my_lm/losses.py", "DU scripts/kill.py")
    ]
    git(folder, "checkout", "--ours", "configs/gpt.yaml")
    git(folder, "add", "configs/gpt.yaml")
    git(folder, "rm", "--quiet", "scripts/kill.py")
    git(folder, "commit", "--no-edit")
    result = run(later, folder, "--update")
    assert "has all of the template already" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
def test_features_are_added_and_removed_later(template: Path, tmp_path: Path):
    folder = tmp_path / "my_lm"
    assert run(template, folder, "--keep", "gpt,reports").returncode == 0
    assert run(template, folder, "--update", "--keep", "gpt,lora").returncode == 0
    git(folder, "merge", "--no-edit", "template")
    mentions(folder, ["gpt", "lora"])
    assert (folder / "my_lm" / "lora").is_dir() and not (folder / "my_lm" / "reports").exists()
    assert "has all of the template already" in run(template, folder, "--update").stdout
    assert run(template, folder, "--update", "--keep", "").returncode == 0
    git(folder, "merge", "--no-edit", "template")
    mentions(folder, [])
    assert "has all of the template already" in run(template, folder, "--update").stdout
    git(folder, "switch", "template")
    result = run(template, folder, "--update")
    assert result.returncode == 2 and "is on the branch template" in result.stderr


def test_the_list_has_the_lines_of_each_feature(template: Path):
    rows = [re.split(r"\s{2,}", line) for line in run(template, "--list").stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == [
        *fork.CHOICES,
        *(f"({n})" for n in fork.FEATURES if n not in fork.CHOICES),
        "(core)",
    ]
    files = (ROOT / "lm_lightning").rglob("*.py")
    assert sum(int(row[1].replace(",", "")) for row in rows) == sum(len(f.read_bytes().splitlines()) for f in files)
    assert all(len(row) == 4 for row in rows if row[0] in ("lora", "compression"))
    page = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")
    assert [name for name in fork.CHOICES if f"`{name}`" not in page] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NEW", "--name", "my-lm"], "the name my-lm is not an identifier"),
        (["NEW", "--name", "class"], "the name class is a keyword"),
        (["NEW", "--name", "json"], "the name json belongs to another module"),
        (["NEW", "--name", "torch"], "the name torch belongs to another module"),
        (["NEW", "--name", "tests"], "the name tests belongs to another module or folder"),
        (["OLD", "--name", "my_lm"], "exists already"),
        (
            ["NEW", "--name", "my_lm", "--keep", "gpt,finetuning"],
            "there is no feature finetuning: the features are gpt,",
        ),
        (["NEW", "--nme", "my_lm"], "unrecognized arguments: --nme"),
        ([], "the folder of the new project is missing"),
        (["NEW", "--update"], "is not a git repository"),
        (["OLD", "--update"], "is not a git repository"),
        (["OLD", "--update", "--name", "my_lm"], "--update keeps the name of the project"),
    ],
    ids=str,
)
def test_refusals(arguments: list[str], message: str, template: Path, tmp_path: Path):
    (tmp_path / "old").mkdir()
    places = {"NEW": str(tmp_path / "new"), "OLD": str(tmp_path / "old")}
    result = run(template, *[places.get(word, word) for word in arguments])
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr
    assert not (tmp_path / "new").exists()


def test_changes_that_are_not_committed_are_refused_where_they_matter(template: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "--quiet", str(template), str(copy))
    (copy / "notes.txt").write_text("of no matter")
    assert run(copy, tmp_path / "first", "--name", "first_lm").returncode == 0
    with open(copy / "README.md", "a", encoding="utf-8") as file:
        file.write("more")
    result = run(copy, tmp_path / "second", "--name", "second_lm")
    assert result.returncode == 2 and "README.md has changes that are not committed" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "first"]


def test_marked_lines_and_tests_go(tmp_path: Path):
    text = "a\nb  # fork: lora\n# fork: gpt, bert\nc\nd  # fork: lora\n# fork: end\n| e | <!-- fork: lora -->\nf\n"
    assert "".join(fork.without_marked(text, ["bert"], "file")) == "a\nc\nf\n"
    assert "".join(fork.without_marked(text, ["lora"], "file")) == "a\nb\n| e |\nf\n"
    for wrong in ("a  # fork: lroa\n", "# fork: lora\nb\n"):
        with pytest.raises(fork.Refusal, match="lroa|without an end"):
            list(fork.without_marked(wrong, ["lora"], "file"))
    tests = 'import a\n\n\n@needs("lora")\n@b\ndef test_c():\n    a\n\n\n@needs("xla")\ndef test_d():\n    a\n'
    assert fork.without_tests(tests, {"lora"}) == 'import a\n\n\n\n\n@needs("xla")\ndef test_d():\n    a\n'
