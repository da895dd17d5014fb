"""The built-in corpus: the English prose that is part of every Python installation.

It consists of the language reference in `pydoc_data.topics` and of the docstrings of the standard library, so that a
first training needs no download. The text depends on the Python version, and so does its `fingerprint`.
"""

import ast
import contextlib
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from lm_lightning.errors import UserError
from lm_lightning.files import write_text

_RULES = 1  # part of the cache's name: increase it when a change of this file changes the text
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_BULLET = re.compile(r"([*+o-]|\(?\w{1,2}[.)]) +")
_UNDERLINE = re.compile(r"([=\-*~^#+\"'.])\1{2,}")
_MARKUP = re.compile(r"\.\. |:[a-z]+[^:]*:(?!`)|@\w+|[|+][ \-=|]")  # directive, field, epytext field, table
_DOCTEST = re.compile(r">>> ?|\.\.\. ")
_ROLE = re.compile(r":[a-z:]+:(?=`)")  # the first half of :class:`Name`
_SENTENCES = re.compile(r"([\"'`(*]*[A-Z]|[\"'`*]+\w).*[a-z\"'`)\]*][.!?:]+[\"'`)*]*")
_CODE = re.compile(r"::=|\s(=|==|->|\+=|\|)\s|[{}\\]|\b(def|class) \w+[(:]|   ")  # or a table: columns far apart


def documents(cache_dir: Path) -> list[tuple[str, str]]:
    """Return the built-in corpus as `(name, text)` pairs, in the same order on every call.

    A document is one topic of the language reference or one module. Its paragraphs are single lines with a blank
    line between them, and no paragraph occurs twice in the corpus. Extraction needs several seconds, so the result is
    cached as a file in `cache_dir`.

    Raises:
        UserError: This Python installation has no sources, as is the case for frozen ones.
    """
    modules = _modules()
    key = json.dumps([_RULES, sys.version, [(name, path.stat().st_size) for name, path in modules]])
    cache = cache_dir / f"builtin-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    if cache.exists():
        return [tuple(json.loads(line)) for line in cache.read_text(encoding="utf-8").splitlines()]
    result = list(_extract(modules))
    with contextlib.suppress(PermissionError):  # perhaps a cache of another user, which can still be read
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_text(cache, "".join(json.dumps(document) + "\n" for document in result))
    return result


def fingerprint(documents: list[tuple[str, str]]) -> str:
    """Return the SHA-256 over the names and texts of `documents`, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


def _modules() -> list[tuple[str, Path]]:
    """Return the standard library's source files with their names, sorted by name."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [(f"stdlib/{path.relative_to(root).as_posix()}", path) for path in paths]
    if not found:
        raise UserError(
            f"the built-in corpus needs the sources of the standard library, but there are none in {root}: give your "
            "own text with --data.corpus.paths"
        )
    return sorted(found)


def _extract(modules: list[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "the built-in corpus needs the module pydoc_data, which this Python installation does not have: give your "
            "own text with --data.corpus.paths"
        ) from None
    sources = [(f"topics/{name}", [text]) for name, text in sorted(topics.items())]
    sources += [(name, _docstrings(path)) for name, path in modules]
    seen: set[str] = set()
    for name, texts in sources:
        kept = []
        for paragraph in (paragraph for text in texts for paragraph in _paragraphs(text)):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        if kept:
            yield name, "\n\n".join(kept)


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a module in source order, none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules contain escapes such as "\d"
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # ValueError: null bytes, or not in the declared encoding
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED) and node.body]
    nodes.sort(key=lambda node: node.body[0].lineno)
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text` that read as sentences, each unwrapped to one line."""
    literal = None  # indentation of the paragraph whose "::" announced the literal block we are in
    for block in re.split(r"\n[ \t]*\n", text.expandtabs()):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indentation = _indentation(lines[0])
        if literal is not None and indentation > literal:
            continue
        literal = indentation if lines[-1].endswith("::") else None
        for item in _items(lines):
            paragraph = _ROLE.sub("", re.sub("::$", ":", " ".join(line.strip() for line in item)))
            paragraph = paragraph[bullet.end() :] if (bullet := _BULLET.match(paragraph)) else paragraph
            if _is_prose(paragraph):
                yield re.sub("  +", " ", paragraph)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _items(lines: list[str]) -> Iterator[list[str]]:
    """Split a block where a list item, a heading or another indentation begins; omit markup and doctests."""
    item: list[str] = []
    for line in lines:
        stripped = line.strip()
        if _DOCTEST.match(stripped):
            break  # the rest of the block is the doctest and its output
        if _UNDERLINE.fullmatch(stripped):
            item = []  # the lines above it are a heading
            continue
        hanging = len(item) == 1 and _BULLET.match(item[0].strip()) and _indentation(line) > _indentation(item[0])
        moved = bool(item) and _indentation(line) != _indentation(item[-1]) and not hanging
        if item and (moved or _BULLET.match(stripped) or _MARKUP.match(stripped)):
            yield item
            item = []
        item.append(line)
    if item:
        yield item


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        len(paragraph.split()) >= 4
        and letters >= 0.8 * len(paragraph)
        and _SENTENCES.fullmatch(paragraph) is not None
        and _CODE.search(paragraph) is None
    )
