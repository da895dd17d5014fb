"""Text files of somebody else, or damaged ones: read up to a bound, with notes about what was not read."""

import os
import stat
from pathlib import Path

WHOLE_BYTES = 4 << 20  # of a file that is read completely
LAST_BYTES = 32 << 20  # of a file of lines, of which the last ones are read


def text_of(file: Path, notes: list[str], most: int = 0, last: bool = False) -> str:
    """The text of a file; empty if there is none, or if it is too large.

    Args:
        file: Its path.
        notes: A sentence is added for what was not read.
        most: Maximum number of bytes that are read. Default: `WHOLE_BYTES`, with `last` `LAST_BYTES`.
        last: Whether the first line and the last lines of a larger file are read.
    """
    most = most or (LAST_BYTES if last else WHOLE_BYTES)
    try:
        about = os.stat(file)
        if not stat.S_ISREG(about.st_mode):  # a pipe or device might have no end
            notes.append(f"{file.name} cannot be read (it is not a file)")
            return ""
        if about.st_size > most and not last:
            notes.append(f"{file.name} is omitted: it has {about.st_size:,} bytes, more than {most:,}")
            return ""
        with open(file, "rb") as stream:
            head = b""
            if about.st_size > most:
                notes.append(f"{file.name}: only the last {most:,} of its {about.st_size:,} bytes are shown")
                head = stream.readline(most)
                stream.seek(about.st_size - most)
                stream.readline(most)  # the rest of a line
            text = (head + stream.read(most)).decode("utf-8", errors="replace")
            return text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{file.name} cannot be read ({error.strerror})")
        return ""
