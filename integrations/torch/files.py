"""Files on the disk: flushed, and their checksums."""

import json
import os
import zlib
from pathlib import Path
from typing import Any


def flush(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    if os.name != "nt":  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def crc32_of(content: Any) -> int:
    """Return the CRC-32 of a value that JSON holds."""
    return zlib.crc32(json.dumps(content).encode())
