"""One file that holds a run: tensors and JSON, as safetensors; reading it runs no code.

The JSON part stands in the file's metadata, so that both are written together, whole or not at all.
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
    """Write a checkpoint in place of the one that is there.

    Parameters
    ----------
    path : Path
    tensors : dict of str to torch.Tensor
    values : dict
        What JSON holds; NaN becomes null.
    """
    metadata = {"format": FORMAT, "version": VERSION, "values": dumps(values)}
    # Copied, for safetensors refuses tensors that share memory.
    whole = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, metadata)
    with written_whole(path) as file:
        file.write(whole)


def read(path, part=""):
    """Return a checkpoint's tensors, of those whose names begin with `part`, and its values.

    Raises
    ------
    InputError
        If it is missing, damaged, no checkpoint of xbm, or one of another version.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata)
            values = json.loads(metadata["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(part)}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no checkpoint of xbm, or is damaged: {error}") from error
    return tensors, values


@contextmanager
def sound(path):
    """Refuse a checkpoint whose parts do not fit each other, wherever that shows within the block."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} is damaged, or was changed: its parts do not fit each other") from error


def _check(path, metadata):
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no checkpoint of xbm: its metadata do not say {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path} is a checkpoint of version {metadata.get('version')}, this xbm reads version {VERSION}"
        )


def dumps(value, **options):
    """Return JSON text, with null for NaN and infinity, which JSON does not know."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
