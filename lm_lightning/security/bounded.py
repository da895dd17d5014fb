"""Reads text files that are untrusted or damaged, up to a maximum size, with notes about what was not read."""

import os
import stat
from pathlib import Path

WHOLE_BYTES = 4 << 20  # maximum size of a file that is read completely
LAST_BYTES = 32 << 20  # maximum size of the last lines that are read of a file


def text_of(file: Path, notes: list[str], most: int = 0, last: bool = False) -> str:
    """Reads the text of a file; empty if the file does not exist or is too large.

    Args:
        file: Path of the file.
        notes: A list to which a sentence is added for everything that was not read.
        most: Maximum number of bytes to read. Default: `LAST_BYTES` if `last` is set, otherwise `WHOLE_BYTES`.
        last: Whether to read the first line and the last lines of a file that is too large.
    """
    most = most or (LAST_BYTES if last else WHOLE_BYTES)
    try:
        about = os.stat(file)
        if not stat.S_ISREG(about.st_mode):  # a pipe or device may be endless
            notes.append(f"{file.name} cannot be read (it is not a regular file)")
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
