"""A file format: reviews that begin with their stars, such as `4/5 A lovely film.`"""

import re
from pathlib import Path

from lm_lightning.data.formats import Format, Rows
from lm_lightning.data.reading import ReadOptions, ReadReport, row_lines
from lm_lightning.errors import UserError


class Reviews(Format):
    """Each line is a review; its row has the columns `stars` and `text`."""

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        for line in row_lines(path, options, report):  # decompresses and decodes the file
            if line.blank:
                continue
            found = re.fullmatch(r"([1-5])/5 (.+)", line.text.strip())
            if found is None:
                raise UserError(f"{path}:{line.number}: the line does not begin with stars: write it as 4/5 and a text")
            yield line.number, {"stars": int(found[1]), "text": found[2]}
