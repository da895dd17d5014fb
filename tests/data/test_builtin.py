import inspect
import json
import sys
import sysconfig

import pytest

from lm_lightning.data import builtin
from lm_lightning.errors import UserError


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache_dir):
    return builtin.documents(cache_dir)


def paragraphs_of(text):
    return list(builtin._paragraphs(inspect.cleandoc(text)))


@pytest.mark.slow
def test_it_is_large_enough_to_train_on(corpus):
    text = "".join(text for _, text in corpus)
    assert len(corpus) > 400
    assert 1.0e6 < len(text.encode()) < 2.0e6
    assert len({name for name, _ in corpus}) == len(corpus)
    assert any(name.startswith("topics/") for name, _ in corpus)
    assert "stdlib/argparse.py" in dict(corpus)


@pytest.mark.slow
def test_it_holds_no_tests_and_no_installed_packages(corpus):
    assert not [name for name, _ in corpus if {"site-packages", "test", "tests", "idle_test"} & set(name.split("/"))]


def test_paragraphs_are_single_lines_of_prose_and_occur_once(corpus):
    paragraphs = [paragraph for _, text in corpus for paragraph in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not [paragraph for paragraph in paragraphs if "\n" in paragraph or ">>>" in paragraph[:4]]
    assert all(paragraph.rstrip("\"'`)*")[-1] in ".!?:" for paragraph in paragraphs)


def test_the_second_call_reads_the_cache(cache_dir, corpus, monkeypatch):
    def fail(*_):
        raise AssertionError("parsed again")

    monkeypatch.setattr(builtin, "_extract", fail)
    assert builtin.documents(cache_dir) == corpus
    assert [path.suffix for path in cache_dir.iterdir()] == [".jsonl"]  # no temporary file stays


def test_another_standard_library_has_another_cache(tmp_path, monkeypatch):
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(stdlib))
    for word in ("first", "second library"):
        (stdlib / "module.py").write_text(f'"""This is the {word} of them."""')
        assert ("stdlib/module.py", f"This is the {word} of them.") in builtin.documents(tmp_path / "cache")


def test_modules_are_parsed_but_not_run_and_broken_ones_skipped(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""One."""\nraise SystemExit\nclass A:\n  """Two."""\n  def f(): "Three."\ndef g(): "Four."\n')
    assert builtin._docstrings(module) == ["One.", "Two.", "Three.", "Four."]
    for broken in (b"def", b"\0", b"'\xff'"):
        module.write_bytes(broken)
        assert builtin._docstrings(module) == []


def test_hard_wrapped_lines_are_joined_and_list_items_are_paragraphs():
    text = """
        A heading, not a sentence.
        ==========================

        This sentence is wrapped  over
        two lines.

        * The first item has
          two lines as well.
        * The second item has one.
    """
    assert paragraphs_of(text) == [
        "This sentence is wrapped over two lines.",
        "The first item has two lines as well.",
        "The second item has one.",
    ]


def test_doctests_code_tables_and_markup_are_dropped():
    text = """
        See :class:`Thing` for what it does::

            This is a literal block of code.

            Another one of the same block.

        >>> print("This is no prose at all.")
        This is no prose at all.

        .. note:: This is a directive of some kind.

        :param thing: This is a field of the function.

        +------+-------------------------------+
        | This | is a table with some columns. |
        +------+-------------------------------+

        Name     This is a column of it.
        f(x) = x + 1 is what it computes.

        The bytes are 0x00, 0x10, 0x20, 0x30, 0x40, 0x50 again.

        The last words are prose again.
    """
    assert paragraphs_of(text) == ["See `Thing` for what it does:", "The last words are prose again."]


def test_the_fingerprint_tells_names_and_texts_apart():
    documents = [("a", "bc"), ("d", "e")]
    others = [[("ab", "c"), ("d", "e")], [("d", "e"), ("a", "bc")], [("a", "bc")], [("a", "bc"), ("d", "f")]]
    assert builtin.fingerprint(documents) == builtin.fingerprint(json.loads(json.dumps(documents)))
    assert builtin.fingerprint(documents) not in [builtin.fingerprint(other) for other in others]


def test_a_python_without_sources_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(UserError, match="--data.corpus.paths"):
        builtin.documents(tmp_path)


def test_a_python_without_topics_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="pydoc_data"):
        builtin.documents(tmp_path)
