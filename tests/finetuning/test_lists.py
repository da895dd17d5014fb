"""Lists in the cells of tables, as JSON or Python write them."""

import json

import pytest
from conftest import needs

from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row


@needs("tasks.tagging", "tasks.parsing", "tasks.questions", "tasks.embedding")
@pytest.mark.parametrize("dump", [json.dumps, repr])
def test_lists_in_cells_of_all_tasks(dump):
    from lm_lightning.tasks.embedding.data import PairColumns, PairData
    from lm_lightning.tasks.parsing.data import ParsingData
    from lm_lightning.tasks.questions.data import Answer, QuestionData
    from lm_lightning.tasks.tagging.data import TaggingData
    from lm_lightning.tasks.tagging.roles import RoleData

    words = ["a", "it's", "[", "c"]
    row = Row(
        {
            "words": dump(words),
            "labels": dump(["O", " B-X", "I-X", "O"]),
            "head": dump([2, 0, 2, 2]),
            "deprel": dump(["x", "root", "y", "z"]),
            "frames": dump([{"predicate": 1, "spans": [[0, 0, "A"]]}]),
            "context": "it is here",
            "answers": dump({"text": ["here"], "answer_start": [6]}),
            "negatives": dump(["one", "two"]),
        },
        "a.csv:2",
    )
    assert row.words("words") == words
    assert TaggingData().labels_in(row) == ["O", "B-X", "I-X", "O"]
    assert ParsingData().heads(row, 4) == [2, 0, 2, 2]
    assert ParsingData().labels_of(row, "deprel") == ["x", "root", "y", "z"]
    assert RoleData().labels_in(row) == ["B-A", "O", "O", "O"]
    assert QuestionData().answers(row) == [Answer("here", 6)]
    assert PairData(columns=PairColumns(negatives="negatives"), hard_negatives=2).negatives(row) == ["one", "two"]


def test_words_are_no_lists_by_accident():
    row = Row({"words": "[ 1 ] see the note", "labels": "O O O O O O", "odd": "['a' 'b']"}, "a.csv:2")
    assert row.words("words") == ["[", "1", "]", "see", "the", "note"]
    assert Row({"words": "[ 1 ]"}, "").words("words") == ["[", "1", "]"]
    assert Row({"words": "[ see below ]"}, "").words("words") == ["[", "see", "below", "]"]
    with pytest.raises(UserError, match="a.csv:2: column 'odd' is .* looks like a list"):
        row.words("odd")
