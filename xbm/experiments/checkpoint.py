"""The checkpoint of a run: one safetensors file with tensors and JSON. Reading it executes no code.

The JSON is stored in the file's metadata, so tensors and JSON are written together, atomically.
"""

import json
import math
from contextlib import contextmanager

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from xbm.experiments.errors import InputError
from xbm.experiments.files import written_whole

NAME = "checkpoint.safetensors"
FORMAT, VERSION = "xbm checkpoint", "1"


def write(path, tensors, values):
    """Write a checkpoint, atomically replacing an existing file.

    Parameters
    ----------
    path : Path
    tensors : dict of str to torch.Tensor
    values : dict
        JSON-serializable values; NaN and infinity are written as null.
    """
    metadata = {"format": FORMAT, "version": VERSION, "values": dumps(values)}
    # Clone: safetensors rejects tensors that share memory.
    whole = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, metadata)
    with written_whole(path) as file:
        file.write(whole)


def read(path, part=""):
    """Return a checkpoint's tensors whose names begin with `part`, and all its values.

    Raises
    ------
    InputError
        If the file is missing, damaged, not an xbm checkpoint, or of another version.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint found at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata)
            values = json.loads(metadata["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(part)}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not an xbm checkpoint, or is damaged: {error}") from error
    return tensors, values


@contextmanager
def sound(path):
    """Turn the errors of inconsistent checkpoint contents within the block into an `InputError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or was modified: its contents are inconsistent") from error


def _check(path, metadata):
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} is not an xbm checkpoint: its metadata must have format {FORMAT!r}, got {metadata.get('format')!r}"
        )
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path} has checkpoint version {metadata.get('version')}, expected {VERSION}: "
            "read it with the version of xbm that wrote it"
        )


def dumps(value, **options):
    """Return JSON text. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
