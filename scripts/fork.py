"""Creates your own project from this template: `python scripts/fork.py ../my_lm --name my_lm --keep gpt,lora`.

The new folder has the files of the template's last commit, with the package renamed and without the features that are
not kept, and its own git history, whose first commit names the template's commit. `--update` commits later changes of
the template to the branch `template` of such a project, which can then be merged. See docs/forking.md.

The table in `fork_features.py` lists the files of each feature. In any text file, a comment at the end of a line, such
as `# fork: lora` or `<!-- fork: lora -->`, marks the line as a part of a feature; such a comment on a line of its own
marks all lines until `fork: end`. Lines with `fork: tagging, parsing` are kept if at least one of these features is
kept; lines with `fork: template` are never kept. A test is marked by its decorator, such as `@needs("tasks.tagging")`.
"""

import argparse
import ast
import importlib.util
import io
import keyword
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from fork_features import CHOICES, FEATURES, PACKAGE, TEMPLATE_ONLY, Feature

ROOT = Path(__file__).resolve().parent.parent
# Files that list packages, one per line; the lines of removed packages are deleted
LISTS = ("features.py", "pyproject.toml", ".importlinter", "package-data")
MARKER = re.compile(r"[ \t]*(?:#|<!--) fork: ([a-z0-9, ]+?)(?: -->)?$")


class Refusal(Exception):
    """An error that the user can correct, in one sentence."""


class Parser(argparse.ArgumentParser):
    """Raises errors as `Refusal`, so that they are printed in one line, as by all commands."""

    def error(self, message: str) -> NoReturn:  # noqa: D102
        raise Refusal(message)


def main() -> None:
    """Reads the command line, and creates or updates a project."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="?", type=Path, help="the new project; with --update, an existing one")
    parser.add_argument("--name", help="name of its package; default: the name of the folder")
    parser.add_argument("--keep", help="features to keep, separated by commas; default: all; with --update: as before")
    parser.add_argument("--list", action="store_true", help="print the features and exit")
    parser.add_argument("--update", action="store_true", help="commit the current template to its branch `template`")
    try:
        arguments = parser.parse_args()
        if arguments.list:
            print(listing())
            return
        if arguments.folder is None:
            raise Refusal("the folder of the new project is missing: python scripts/fork.py ../my_lm --name my_lm")
        if arguments.update:
            if arguments.name:
                raise Refusal("--update keeps the name of the project: omit --name")
            update(arguments.folder, arguments.keep)
        else:
            create(arguments.folder, check_name(arguments.name or arguments.folder.name), arguments.keep)
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def listing() -> str:
    """The table of features, with the number of lines of their packages, without tests."""

    def count(package: str) -> int:
        return sum(len(file.read_bytes().splitlines()) for file in (ROOT / PACKAGE / package).rglob("*.py"))

    lines = {name: count(feature.package.replace(".", "/")) for name, feature in FEATURES.items()}
    rows = [("feature", "lines", "extras", "")]
    rows += [(name, f"{lines[name]:,}", ", ".join(FEATURES[name].extras), FEATURES[name].summary) for name in CHOICES]
    for name in (name for name in FEATURES if name not in CHOICES):
        rows.append((f"({name})", f"{lines[name]:,}", "", f"kept with {', '.join(FEATURES[name].needed_by)}"))
    rows.append(("(core)", f"{count('') - sum(lines.values()):,}", "", "always kept"))
    return "\n".join(f"{name:16}{number:>6}  {extras:10}{summary}".rstrip() for name, number, extras, summary in rows)


def create(folder: Path, name: str, keep: str | None) -> None:
    """Creates a project in a new folder.

    Raises:
        Refusal: If the folder exists, a feature is unknown, or this is not a clean checkout of the template.
    """
    kept, commit = features(keep), template_commit()
    if folder.exists():
        raise Refusal(f"{folder} exists already: choose a new folder")
    if folder.resolve() == ROOT or ROOT in folder.resolve().parents:
        raise Refusal(f"{folder} is inside the template: choose a folder next to it, such as ../{name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "project"
        write(made, name, kept)
        git("init", "--quiet", "--initial-branch", "main", at=made)
        git("add", "--all", at=made)
        git("commit", "--quiet", "--no-verify", "--message", message(name, keep, commit), at=made)
        git("branch", "template", at=made)
        made.rename(folder)
    removed = [feature for feature in FEATURES if feature not in kept]
    print(f"{folder}: the package {name}" + (f", without {', '.join(removed)}" if removed else ""))
    print(f"next: cd {shlex.quote(str(folder))} && pip install -e '.[test]' && pytest -n 2")


def update(folder: Path, keep: str | None) -> None:
    """Commits the current template, with the name and the features of an existing project, to its branch `template`.

    Raises:
        Refusal: If the folder is not a project that this script has created, or this is not a clean checkout of the
            template.
    """
    commit = template_commit()
    try:
        # The last merged commit of the template is an ancestor of the current commit of any branch.
        parent = git("log", "-1", "--grep", "^Template-Commit: ", "--format=%H", "HEAD", at=folder)
        body = git("log", "-1", "--format=%B", parent, at=folder) if parent else ""
    except (subprocess.CalledProcessError, FileNotFoundError, NotADirectoryError):
        raise Refusal(f"{folder} is not a git repository") from None
    if not (found := re.search(r"^Template-Options: (.+)$", body, re.M)):
        raise Refusal(f"{folder} has no commit with a line Template-Options, which scripts/fork.py writes")
    options = Parser(allow_abbrev=False)
    options.add_argument("--name", required=True)
    options.add_argument("--keep")
    given = options.parse_args(shlex.split(found[1]))
    keep = given.keep if keep is None else keep
    if git("rev-parse", "--abbrev-ref", "HEAD", at=folder) == "template":
        raise Refusal(f"{folder} is on the branch template, but must be on another one: run git switch main")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "project"
        write(made, given.name, features(keep))
        where = {"GIT_DIR": git("rev-parse", "--absolute-git-dir", at=folder), "GIT_WORK_TREE": str(made)}
        where["GIT_INDEX_FILE"] = str(Path(scratch) / "index")
        git("add", "--all", at=made, **where)
        tree = git("write-tree", at=made, **where)
        if tree == git("rev-parse", f"{parent}^{{tree}}", at=folder):
            print(f"{folder} has all of the template already")
            return
        text = message(given.name, keep, commit)
        new = git("commit-tree", tree, "-p", parent, "-m", text, at=made, **where)
        git("update-ref", "refs/heads/template", new, at=folder)
    print(f"next: cd {shlex.quote(str(folder))} && git merge template")


def message(name: str, keep: str | None, commit: str) -> str:
    """The message of a commit, which contains everything that an update needs."""
    options = f"--name {name}" + ("" if keep is None else f" --keep {shlex.quote(keep.replace(' ', ''))}")
    subject = f"{name}, made from {PACKAGE} {commit[:10]}"
    return f"{subject}\n\nTemplate-Commit: {commit}\nTemplate-Options: {options}\n"


def check_name(name: str) -> str:
    """Returns the name if it can be the name of a package.

    Raises:
        Refusal: If it is not an identifier, or already the name of another module.
    """
    if not name.isidentifier() or not name.isascii():
        raise Refusal(f"the name {name} is not an identifier: use letters, digits and _, such as --name my_lm")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise Refusal(f"the name {name} is a keyword of Python: choose another --name")
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "scripts"))]
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None or (ROOT / name).exists():
        raise Refusal(f"the name {name} belongs to another module or folder: choose another --name")
    return name


def features(keep: str | None) -> list[str]:
    """The features to keep, including those that they need.

    Raises:
        Refusal: If a feature does not exist.
    """
    names = CHOICES if keep is None else [name for name in re.split(r"[\s,]+", keep) if name]
    if unknown := [name for name in names if name not in CHOICES]:
        raise Refusal(f"there is no feature {unknown[0]}: the features are {', '.join(CHOICES)}")
    return [name for name, feature in FEATURES.items() if name in names or set(feature.needed_by) & set(names)]


def template_commit() -> str:
    """The current commit of the template.

    Raises:
        Refusal: If this is not a git checkout, or files have changes that are not committed.
    """
    try:
        if Path(git("rev-parse", "--show-toplevel", at=ROOT)).resolve() != ROOT:
            raise FileNotFoundError
        commit = git("rev-parse", "HEAD", at=ROOT)
        changed = git("status", "--porcelain", "--untracked-files=no", at=ROOT)
    except (subprocess.CalledProcessError, FileNotFoundError):
        raise Refusal(
            f"{ROOT} is not a git checkout: clone the template with git, so that projects can be updated later"
        ) from None
    if changed:
        raise Refusal(f"{changed.split()[1]} has changes that are not committed: commit or discard them")
    return commit


def git(*arguments: str, at: Path, **variables: str) -> str:
    """Runs a git command in a folder, and returns its output."""
    names = {"GIT_AUTHOR_NAME": PACKAGE, "GIT_COMMITTER_NAME": PACKAGE}  # if git has no user
    names |= {key.replace("NAME", "EMAIL"): f"{PACKAGE}@localhost" for key in names}
    known = subprocess.run(["git", "config", "user.email"], cwd=at, capture_output=True).returncode == 0
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment = clean | ({} if known else names) | variables
    result = subprocess.run(
        ["git", *arguments], cwd=at, env=environment, check=True, capture_output=True, encoding="utf-8"
    )
    return result.stdout.strip()


def write(folder: Path, name: str, kept: list[str]) -> None:
    """Writes the files of the template's last commit with the new name, without the features that are not kept."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    removed = [feature for key, feature in FEATURES.items() if key not in kept]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if not member.isfile() or not is_kept(member.name, removed):
                continue
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            place = folder / renamed(member.name, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(edited(member.name, content, name, kept, removed))
            place.chmod(member.mode)
    tidy(folder)


def is_kept(path: str, removed: Iterable[Feature]) -> bool:
    """Whether a file is kept; its path is relative to the repository."""
    if path in TEMPLATE_ONLY:
        return False
    for feature in removed:
        inside = feature.package.replace(".", "/")
        places = (f"{PACKAGE}/{inside}/", f"tests/{inside}/", *feature.files)
        if any(path.startswith(place.rstrip("*")) if place[-1] in "*/" else path == place for place in places):
            return False
    return True


def edited(path: str, content: bytes, name: str, kept: list[str], removed: list[Feature]) -> bytes:
    """The content of a file in the new project; files that are not text are not changed."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return content
    if path == "LICENSE":
        return content
    text = "".join(without_marked(text, kept, path))
    if path.endswith(".py") and path.startswith("tests/") and "@needs(" in text:
        text = without_tests(text, {feature.package for feature in removed})
    if Path(path).name in LISTS:
        packages = "|".join(re.escape(feature.package) for feature in removed) or "(?!)"
        text = re.sub(rf"\((?:{packages})\) : | : \((?:{packages})\)", "", text)  # several import layers in a line
        listed = re.compile(rf"(\b{PACKAGE}\.|[\"']\(?)({packages})\b(?!/)")
        text = "".join(line for line in text.splitlines(keepends=True) if not listed.search(line))
    if path == "pyproject.toml":
        text = without_extras(text, [extra for feature in removed for extra in feature.extras])
    if path.endswith(".md"):
        text = without_empty(text)
    return renamed(text, name).encode("utf-8")


def renamed(text: str, name: str) -> str:
    """A text or a path with the name of the new package, in all of its forms."""
    dashed, capitals = PACKAGE.replace("_", "-"), PACKAGE.upper()
    text = text.replace(PACKAGE, name).replace(dashed, name.replace("_", "-"))
    return text.replace(capitals, name.upper())


def without_marked(text: str, kept: list[str], path: str) -> Iterator[str]:
    """The lines of a text without those that a comment `fork: FEATURE` marks as parts of features that are not kept."""
    block: bool | None = None  # whether the lines of the current block are kept; None outside of blocks
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        found = MARKER.search(line.rstrip("\r\n"))
        if not found:
            if block is not False:
                yield line
            continue
        names = re.split(r"[ ,]+", found[1])
        if wrong := set(names) - {*FEATURES, "template", "end"}:
            raise Refusal(f"{path}, line {number} names the feature {wrong.pop()}, which does not exist")
        alone = not MARKER.sub("", line).strip()
        if names == ["end"]:
            block = None
        elif alone:
            block = any(name in kept for name in names)
        elif block is not False and any(name in kept for name in names):
            yield MARKER.sub("", line)
    if block is not None:
        raise Refusal(f"{path} has a block of a feature without an end: add a line with fork: end")


def without_tests(text: str, packages: set[str]) -> str:
    """The source of a test file without the tests whose decorator `needs` names one of the packages."""
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        calls = [call for call in getattr(node, "decorator_list", []) if isinstance(call, ast.Call)]
        named = {
            argument.value
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "needs"
            for argument in call.args
            if isinstance(argument, ast.Constant)
        }
        if named & packages:
            del lines[node.decorator_list[0].lineno - 1 : node.end_lineno]  # type: ignore[attr-defined]
    return "".join(lines)


def without_extras(text: str, extras: list[str]) -> str:
    """A pyproject.toml without some of the optional dependencies."""
    for extra in extras:
        text = re.sub(rf"^{re.escape(extra)} = \[.*\n", "", text, flags=re.M)

    def others(found: re.Match) -> str:
        left = [extra for extra in found[1].split(",") if extra not in extras]
        return f'"{PACKAGE}[{",".join(left)}]",' + found[0].partition(']",')[2] if left else ""

    return re.sub(rf'"{PACKAGE}\[([\w,]+)\]", ?', others, text)


def without_empty(text: str) -> str:
    """A Markdown text without tables that have no rows, headings of empty sections, and repeated blank lines."""
    text = re.sub(r"^\|.*\n\|[-:| ]+\n(?!\|)", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"
    shorter = re.sub(r"^(##+) .*\n\s*(?=\Z|##)(?!\1#)", "", text, flags=re.M)
    return text if shorter == text else without_empty(shorter)


def tidy(folder: Path) -> None:
    """Sorts imports, removes imports that are no longer used, and wraps lines, if ruff is installed."""
    if shutil.which("ruff") is None:
        print(
            "warning: ruff is not installed, so imports are not sorted and lines are not wrapped: pip install ruff",
            file=sys.stderr,
        )
        return
    for command in (["check", "--fix", "--quiet", "--exit-zero"], ["format", "--quiet"]):
        subprocess.run(["ruff", *command, "--no-cache", "."], cwd=folder, check=False, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
