"""Atomic writing of files."""

import os
from contextlib import contextmanager


@contextmanager
def written_whole(path, *, temporary=None):
    """Open a temporary file next to `path` for writing bytes; rename it to `path` if the block raises no error.

    By default the temporary name contains the process id. A caller that holds a lock may pass a fixed name instead, so
    that the next run replaces a file that a killed run left behind.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
