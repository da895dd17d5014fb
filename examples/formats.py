"""A file format: reviews with their stars before them, such as `4/5 A lovely film.`"""

import re
from pathlib import Path

from lm_lightning.data.formats import Format, Rows
from lm_lightning.data.reading import ReadOptions, ReadReport, row_lines
from lm_lightning.errors import UserError


class Reviews(Format):
    """One review in each line; gives rows with the columns `stars` and `text`."""

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        for line in row_lines(path, options, report):  # which may be compressed, or of another encoding
            if line.blank:
                continue
            found = re.fullmatch(r"([1-5])/5 (.+)", line.text.strip())
            if found is None:
                raise UserError(f"{path}:{line.number}: the line does not begin with stars: write it as 4/5 and a text")
            yield line.number, {"stars": int(found[1]), "text": found[2]}
