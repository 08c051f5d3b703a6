"""Files that are written whole or not at all."""

import os
from contextlib import contextmanager


@contextmanager
def written_whole(path, *, temporary=None):
    """Open a file for writing bytes under a temporary name beside `path`, and put it in place if nothing is raised.

    The name is this process's own, unless the caller holds a lock on a name that is the same in every run: then what a
    killed run left behind under it is replaced too.
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
