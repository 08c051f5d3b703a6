"""The user's own pictures: a folder of class folders, or an .npz, read into one array."""

import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple
from zipfile import is_zipfile

import numpy as np
from PIL import Image, ImageOps

from xbm.experiments.errors import InputError

GREY = ("1", "L")  # Pillow's modes that fit into one 8-bit channel without loss
WIDE = ("I", "F")  # first letters of Pillow's modes with more than 8 bits per channel


class Pictures(NamedTuple):
    """Labelled pictures of one shape (n pictures, C classes)."""

    images: np.ndarray  # (n, channels, height, width) uint8, channels 1 or 3
    labels: np.ndarray  # (n,) int64, 0 .. C - 1
    names: tuple[str, ...]  # class names

    def of(self, names):
        """Return the pictures of the named classes, with labels 0, 1, ... in the given order."""
        place = {name: i for i, name in enumerate(names)}
        number = np.array([place.get(name, -1) for name in self.names])[self.labels]
        rows = np.flatnonzero(number >= 0)
        return Pictures(self.images[rows], number[rows], tuple(names))

    def fingerprint(self):
        """Return a digest of every picture, its class, and their order."""
        digest = hashlib.blake2b(repr((self.images.shape, self.names)).encode(), digest_size=16)
        for array in (self.labels, self.images):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def load(path, *, size=None):
    """Read labelled pictures from a folder with one subfolder per class, or from an .npz with `images` and `labels`.

    Parameters
    ----------
    path : path
        In a folder, each subfolder is a class and the picture files in it are its pictures. Other files, and names that
        begin with a dot, are ignored. In an .npz, `images` are (n, height, width) or (n, height, width, 1 or 3)
        uint8 and `labels` (n,) integers or strings.
    size : int, optional
        Resize every picture to `size` x `size` pixels; the aspect ratio is not kept.

    Returns
    -------
    Pictures
        The classes are sorted by name, numeric labels by value. One channel if every picture is grey, else three.
        EXIF rotation is applied; alpha is composited on white.

    Raises
    ------
    InputError
        If `path` does not exist or holds no pictures, a picture cannot be read, the pictures differ in size and `size`
        is not given, or a class has fewer than two pictures.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: expected a folder with one subfolder per class, or an .npz")
    try:
        pictures = _from_folder(path, size) if path.is_dir() else _from_npz(path, size)
    except MemoryError as error:
        raise InputError(f"the pictures of {path} do not fit into memory: try a smaller --size") from error
    counts = np.bincount(pictures.labels, minlength=len(pictures.names))
    few = np.flatnonzero(counts < 2)
    if few.size:
        name, count = pictures.names[few[0]], int(counts[few[0]])
        others = f", as do {few.size - 1} other classes" if few.size > 1 else ""
        raise InputError(f"every class needs at least 2 pictures, class {name!r} has fewer ({count}){others}")
    return pictures


def _from_folder(path, size):
    folders = sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not folders:
        raise InputError(f"{path} contains no subfolders: expected one per class, with its pictures inside")
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, labels, first = [], [], None
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir()):
            if file.name.startswith("."):
                continue
            if file.is_dir():
                raise InputError(f"class folder {folder} contains a folder, {file.name}: expected picture files only")
            if file.suffix.lower() not in known:
                continue
            image = _decoded(file, size)
            first = first or (file, image.shape[:2])
            if image.shape[:2] != first[1]:
                sizes = (f"{one} is {shape[1]} x {shape[0]}" for one, shape in (first, (file, image.shape)))
                raise InputError(f"all pictures must have one size, but {' and '.join(sizes)}: resize them with --size")
            images.append(image)
            labels.append(label)
    names = tuple(folder.name for folder in folders)
    if not images:
        raise InputError(f"no pictures found in the subfolders of {path} ({len(folders)} subfolders)")
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2) for image in images]
    return Pictures(_channels_first(np.stack(images)), np.array(labels, np.int64), names)


def _decoded(file, size):
    """Read a picture file into (height, width) or (height, width, 3) uint8."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            wide = image.mode.startswith(WIDE)
            picture = None if wide else _resized(_plain(ImageOps.exif_transpose(image)), size)
    except Exception as error:  # decoders raise many types of errors
        problem = str(error).replace(repr(str(file)), "it") or repr(error)
        raise InputError(f"{file} cannot be read as a picture: {problem}") from error
    if wide:
        raise InputError(f"{file} must have 8 bits per channel, got more (Pillow mode {image.mode})")
    return np.asarray(picture)


def _plain(image):
    """Convert a Pillow image to mode L or RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in GREY else "RGB")


def _resized(image, size):
    return image if size is None else image.resize((size, size), Image.Resampling.BILINEAR)


def _from_npz(path, size):
    images, labels = _arrays(path, "images", "labels")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise InputError(
            f"images in {path} must be uint8 of shape (n, height, width) or (n, height, width, 1 or 3), "
            f"got {images.dtype} of shape {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU":
        raise InputError(
            f"labels in {path} must be {len(images)} integers or strings, one per image, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if images.size == 0:
        raise InputError(f"{path} contains no pictures: images has shape {images.shape}")
    if size is not None:
        images = images[..., 0] if images.shape[3:] == (1,) else images
        images = np.stack([np.asarray(_resized(Image.fromarray(image), size)) for image in images])
    names, numbers = np.unique(labels, return_inverse=True)
    return Pictures(_channels_first(images), numbers.astype(np.int64), tuple(str(name) for name in names.tolist()))


def groups(path, name, pictures):
    """Return the group of each class, from the array `name` of an .npz, which has one entry per image."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"--split-by {name} needs an .npz with an array {name}, got the folder {path}")
    (array,) = _arrays(path, name)
    if array.shape != pictures.labels.shape or array.dtype.kind not in "iuU":
        raise InputError(
            f"{name} in {path} must be {len(pictures.labels)} integers or strings, one per image, "
            f"got {array.dtype} of shape {array.shape}"
        )
    of_class = array[np.unique(pictures.labels, return_index=True)[1]]
    torn = np.flatnonzero(array != of_class[pictures.labels])
    if torn.size:
        label = pictures.labels[torn[0]]
        raise InputError(
            f"all pictures of a class must be in one group of {name}, class {pictures.names[label]!r} is in "
            f"{of_class[label]} and {array[torn[0]]}"
        )
    return of_class


def _arrays(path, *names):
    if not is_zipfile(path):
        raise InputError(f"{path} cannot be read as an .npz of plain arrays: not a zip archive, or truncated")
    try:
        # Open the file here: numpy 2.4 does not close it if the archive is damaged.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            found = [] if missing else [archive[name] for name in names]
            there = ", ".join(archive)
            if not all(isinstance(one, np.ndarray) for one in found):
                raise ValueError("it contains entries that are not arrays")
    except Exception as error:  # damaged zip archives and numpy headers raise many types of errors
        raise InputError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    if missing:
        raise InputError(f"{path} has no array {' and no array '.join(missing)}: its arrays are {there or 'none'}")
    return found


def _channels_first(images):
    """Convert (n, H, W) or (n, H, W, C) to (n, C, H, W)."""
    return images[:, None] if images.ndim == 3 else np.ascontiguousarray(np.moveaxis(images, -1, 1))
