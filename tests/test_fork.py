"""`scripts/fork.py` makes projects that work: all modules import, a recipe trains, the tests are collected."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from conftest import ROOT
from forks import python

spec = spec_from_file_location("fork", ROOT / "scripts" / "fork.py")
assert spec and spec.loader
fork = sys.modules["fork"] = module_from_spec(spec)
spec.loader.exec_module(fork)

# Run in a process that has imported the libraries: FOLDER NAME TESTS, where TESTS are recipes to train
CHECK = """
import importlib, io, contextlib, os, pkgutil, sys
folder, name, recipes = sys.argv[1:]
sys.path.insert(0, folder)
os.environ["PYTHONPATH"] = folder
os.chdir(folder)
package = importlib.import_module(name)
assert package.__file__.startswith(folder), package.__file__
for module in pkgutil.walk_packages(package.__path__, name + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
main = importlib.import_module(name + ".__main__")
sys.argv = [name, "--help"]
main.main()
import pytest
options = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-W", "ignore"]
status = pytest.main([*options, "tests/test_configs.py", "-k", recipes])
assert status == 0, "the recipes fail"
status = pytest.main([*options, "--collect-only", "tests"])
assert status == 0, "tests are not collected"
print("all is well")
"""


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
def make(template: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a project `my_lm` and checks that nothing of what was removed is mentioned in it."""

    def make(keep: list[str]) -> Path:
        folder = tmp_path / "my_lm"
        result = run(template, folder, *([] if keep == fork.CHOICES else ["--keep", ",".join(keep)]))
        assert result.returncode == 0, result.stderr
        mentions(folder, keep)
        return folder

    return make


def mentions(folder: Path, keep: list[str]) -> None:
    """Checks that a project names no module, class, config or page that it does not have, and not the template."""
    kept = fork.features(",".join(keep))
    gone: set[str] = set()
    classes: set[str] = set()  # not in the documentation and configs; elsewhere they may be examples in a sentence
    for feature in (feature for name, feature in fork.FEATURES.items() if name not in kept):
        inside = ROOT / "lm_lightning" / feature.package.replace(".", "/")
        sources = [file.read_text(encoding="utf-8") for file in inside.rglob("*.py")]
        classes |= {name for source in sources for name in re.findall(r"^class ([A-Z]\w*[a-z][A-Z]\w*)", source, re.M)}
        gone |= {f"my_lm.{feature.package}", f"my_lm/{feature.package.replace('.', '/')}"}
        gone |= {path for pattern in feature.files for path in [pattern.rstrip("*/")] if "/" in path}
    texts = {
        path: path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (".py", ".md", ".yaml")
    }
    classes -= {name for text in texts.values() for name in re.findall(r"^class ([A-Z]\w+)", text, re.M)}

    def pattern(names: set[str]) -> re.Pattern:
        return re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, sorted(names)))})(?!\w)" if names else "(?!)")

    patterns = {".py": pattern(gone), ".md": pattern(gone | classes), ".yaml": pattern(gone | classes)}
    found = {
        f"{path.relative_to(folder)}:{number}: {match[1]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := patterns[path.suffix].search(line))
    }
    assert not found, "\n".join(sorted(found))
    assert not any(re.search("lm.lightning", text, re.I) for text in texts.values())
    for path, text in texts.items():
        if path.suffix == ".md":
            links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
            assert all((path.parent / link).exists() for link in links), (path, links)


def check(folder: Path, recipes: str) -> None:
    """Imports everything in a project, trains recipes, collects its tests, and checks its contracts of imports."""
    result = subprocess.run(
        [python("transformers"), "-c", CHECK, str(folder), folder.name, recipes],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=550,
    )
    assert result.returncode == 0 and "all is well" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]
    lint = shutil.which("lint-imports")
    if lint and "importlinter" in (folder / "pyproject.toml").read_text(encoding="utf-8"):
        result = subprocess.run([lint], capture_output=True, text=True, cwd=folder)
        assert result.returncode == 0, result.stdout + result.stderr
    if ruff := shutil.which("ruff"):
        for words in (["check"], ["format", "--check"]):
            result = subprocess.run([ruff, *words, "."], capture_output=True, text=True, cwd=folder)
            assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_everything_is_kept(make: Callable[..., Path]):
    check(make(fork.CHOICES), "gpt or sentiment")


def test_gpt_alone(make: Callable[..., Path]):
    folder = make(["gpt"])
    check(folder, "gpt")
    lines, all_lines = (
        sum(len(file.read_text(encoding="utf-8").splitlines()) for file in package.rglob("*.py"))
        for package in (folder / "my_lm", ROOT / "lm_lightning")
    )
    assert lines < 0.52 * all_lines


@pytest.mark.slow
def test_bert_and_classification(make: Callable[..., Path]):
    check(make(["bert", "classification"]), "bert or sentiment")


@pytest.mark.slow
@pytest.mark.parametrize("feature", fork.CHOICES)
def test_each_feature_can_be_removed(feature: str, make: Callable[..., Path]):
    check(make([name for name in fork.CHOICES if name != feature]), "gpt")


def test_first_commit_names_the_template_and_the_options(template: Path, make: Callable[..., Path]):
    folder = make(["gpt", "lora"])
    body = git(folder, "log", "--format=%B")
    assert git(template, "rev-parse", "HEAD") in body and "--name my_lm --keep gpt,lora" in body
    assert git(folder, "rev-list", "--count", "HEAD") == "1" and not git(folder, "status", "--porcelain")
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    assert 'name = "my_lm"' in text and 'my-lm = "my_lm.__main__:main"' in text
    assert re.search(r"^lora = ", text, re.M) and not re.search(r"^(compress|bert|wandb) = |\[data,bert", text, re.M)
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
