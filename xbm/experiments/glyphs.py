"""The demo's data: every character of sixteen typefaces, drawn askew, blurred and noisy, without a download.

The faces are those that matplotlib installs. A class is a character, an instance is that character in one
face under one random distortion: many classes of few images, which is what a memory is for. With the classes
split in two they ask for zero-shot retrieval, by which metric learning is judged.
"""

import hashlib
import unicodedata
import warnings
from functools import cache as cached
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import PIL.features
from filelock import FileLock
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from platformdirs import user_cache_path

from xbm.experiments.files import written_whole

# What is drawn. All constants in capitals are part of the cache file's name: change one, and it is made anew.
VERSION = 1  # raise it when the code below changes what is drawn
FACES = (
    *("DejaVuSans" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *("DejaVuSansMono" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *("DejaVuSerif" + style for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *("STIXGeneral" + style for style in ("", "Bol", "Italic", "BolIta")),
)
LEAST_FACES = 12  # a class has at least this many images
QUICK_CLASSES = 120
LOOKALIKE_FACES = (FACES.index("DejaVuSans"), FACES.index("DejaVuSerif"))
LOOKALIKE_SIDE = 24  # pixels; the characters are compared in squares of this side
LOOKALIKE_CORRELATION = 0.97  # above it, two characters are one class

# How it is distorted. Each image draws its own values, uniformly from [-x, x] or between the two given.
SEED = 0
SIDE = 28  # pixels
INK = 22.0  # pixels; the longer side of the ink before the distortion
EDGE = 1.0  # pixels; the ink keeps this far from the border
ROTATION = 15.0  # degrees
SHEAR = 0.2  # pixels sideways per pixel of height
SCALE = (0.8, 1.15)
SHIFT = 2.0  # pixels, less where the border is nearer
BLUR = (0.0, 1.0)  # pixels; standard deviation of a Gaussian
NOISE = (0.0, 25.0)  # grey levels of 255; standard deviation

# How it is drawn: large and upright first, then resampled once, on a grid finer than the image's.
FONT_SIZES = (64, 160, 512)  # pixels per em; the first that makes the ink LEAST_INK pixels long is taken
LEAST_INK = 40
MARGIN = 1.15  # side of the square that the ink is drawn in, over the ink's longer side
FINER = 3


class Glyphs(NamedTuple):
    """Images of characters, sorted by class and then by face (n images, C classes)."""

    images: np.ndarray  # (n, 28, 28) uint8, paper 0, ink 255
    labels: np.ndarray  # (n,) int64, 0 .. C - 1
    characters: tuple[str, ...]  # C characters, what class c shows
    faces: np.ndarray  # (n,) int64, index into `FACES`


def load(*, quick=False, cache=None):
    """Return the glyphs, from the cache if they are there, and leave them there if not.

    About 1,790 classes and 24,400 images, the same at every call. A class has one image for each face that
    holds its character, at least `LEAST_FACES`. If the folder cannot be written to, this warns, renders the
    images, in seconds, and returns them all the same.

    Parameters
    ----------
    quick : bool
        Only `QUICK_CLASSES` classes, from all over the whole and image for image the same. For tests.
    cache : path, optional
        Folder to keep the images in; the user's cache folder for xbm if left out.

    """
    folder = user_cache_path("xbm") if cache is None else Path(cache)
    file = folder / f"glyphs-{_fingerprint()}{'-quick' if quick else ''}.npz"
    glyphs = _read(file)  # without the lock: a file appears under its name whole or not at all
    if glyphs is not None:
        return glyphs
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=300):
            glyphs = _read(file)  # by now another run may have made it
            if glyphs is None:
                glyphs = render(quick=quick)
                _write(glyphs, file)
    except (OSError, NotImplementedError) as problem:  # the second where the file system has no locks
        message = f"The glyphs cannot be kept in {folder}, so each run renders them anew: {problem!r}."
        warnings.warn(message, stacklevel=2)
    return render(quick=quick) if glyphs is None else glyphs


def split(glyphs, *, train=0.6, seed=0):
    """Return `(train, test)`, two `Glyphs` with no class in common.

    Of C classes, `round(train * C)` random ones are for training. Both are numbered from 0, in the old order.

    Raises
    ------
    ValueError
        If one of the two would have no class.

    """
    count = len(glyphs.characters)
    cut = round(train * count)
    if not 0 < cut < count:
        raise ValueError(f"train must leave classes on both sides, got train={train} of {count} classes")
    order = np.random.default_rng(seed).permutation(count)
    return _subset(glyphs, np.sort(order[:cut])), _subset(glyphs, np.sort(order[cut:]))


def _subset(glyphs, classes):
    """Keep some classes, given in ascending order, and number them from 0."""
    kept = np.isin(glyphs.labels, classes)
    labels = np.searchsorted(classes, glyphs.labels[kept])
    characters = tuple(glyphs.characters[old] for old in classes)
    return Glyphs(glyphs.images[kept], labels, characters, glyphs.faces[kept])


def render(*, quick=False):
    """Draw the glyphs without looking for them in a cache; see `load`."""
    held = [_characters(face) for face in range(len(FACES))]
    candidates = sorted(c for c in set().union(*held) if sum(c in face for face in held) >= LEAST_FACES)
    # The lowest code point stands for its look-alikes: with images of them all, such a class would be bigger.
    characters = tuple(candidates[i] for i in np.unique(lookalikes(candidates)))
    if quick:
        characters = characters[:: len(characters) // QUICK_CLASSES][:QUICK_CLASSES]

    images, labels, faces = [], [], []
    for label, character in enumerate(characters):
        # One stream per character, so that an image does not depend on which others are drawn.
        rng = np.random.default_rng((SEED, ord(character)))
        for face in [face for face in range(len(FACES)) if character in held[face]]:
            images.append(_distort(_upright(face, character), rng))
            labels.append(label)
            faces.append(face)
    return Glyphs(np.stack(images), np.array(labels, np.int64), characters, np.array(faces, np.int64))


def lookalikes(characters):
    r"""Return for each of n characters the index of the first one that looks like it, (n,) int64.

    Two look alike if their ink, brought to one size and position, correlates above `LOOKALIKE_CORRELATION` in
    one of `LOOKALIKE_FACES`, or if a chain of such pairs joins them.

    Examples
    --------
    >>> lookalikes("AB\N{GREEK CAPITAL LETTER ALPHA}\N{CYRILLIC CAPITAL LETTER A}").tolist()
    [0, 1, 0, 0]

    """
    pairs = []
    for face in LOOKALIKE_FACES:
        rows = np.array([i for i, character in enumerate(characters) if character in _characters(face)], int)
        pixels = np.empty((len(rows), LOOKALIKE_SIDE**2), np.float32)
        for row, i in enumerate(rows):
            square = _upright(face, characters[i]).resize((LOOKALIKE_SIDE,) * 2, Image.Resampling.BILINEAR)
            pixels[row] = np.ravel(square)
        pixels -= pixels.mean(axis=1, keepdims=True)
        pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)  # not 0: there is ink, and a margin round it
        pairs.append(rows[np.argwhere(pixels @ pixels.T > LOOKALIKE_CORRELATION)])
    left, right = np.concatenate(pairs).T

    # Each takes the least index among those it looks like, until the least of its chain has come through.
    first = np.arange(len(characters))
    while (first[left] != first[right]).any():
        np.minimum.at(first, left, first[right])
    return first


def _font_file(face):
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FACES[face]}.ttf")


@cached
def _characters(face):
    """Return the set of characters that a face draws with ink; no marks, spaces and controls."""
    with TTFont(_font_file(face)) as font:
        start, id_of = font["loca"], font.getGlyphID  # glyph i's outline is bytes start[i] to start[i + 1]
        inked = {name for name in font.getGlyphOrder()[1:] if start[id_of(name) + 1] > start[id_of(name)]}
        held = [chr(code) for code, name in font.getBestCmap().items() if name in inked]
    return {character for character in held if unicodedata.category(character)[0] not in "MZC"}


@cached
def _font(face, size):
    # Without the basic layout, the images would depend on whether Pillow finds libraqm.
    return ImageFont.truetype(_font_file(face), size, layout_engine=ImageFont.Layout.BASIC)


def _upright(face, character):
    """Draw a character undistorted, its ink in the middle of a square that is a little larger."""
    for size in FONT_SIZES:
        left, top, right, bottom = _font(face, size).getbbox(character)  # holds the ink, not always tightly
        drawn = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=_font(face, size))
        ink = drawn.crop(drawn.getbbox())
        if max(ink.size) >= LEAST_INK:
            break
    square = Image.new("L", (round(MARGIN * max(ink.size)),) * 2)
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return square


def _distort(square, rng):
    """Rotate, shear, scale, shift, blur and sprinkle an upright character; (28, 28) uint8."""
    left, top, right, bottom = square.getbbox()
    ink = np.array([right - left, bottom - top])
    angle, shear = np.deg2rad(rng.uniform(-ROTATION, ROTATION)), rng.uniform(-SHEAR, SHEAR)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    # The corners of the ink's box stay in the image: the scale gives way first, the shift has what is left.
    room = SIDE / 2 - EDGE
    reach = np.abs(turn) @ (ink / 2)
    scale = min(rng.uniform(*SCALE) * INK / ink.max(), room / reach.max())
    shift = rng.uniform(-1, 1, size=2) * np.minimum(SHIFT, room - scale * reach)

    # Pillow asks for the way back: from a point of the fine grid to one of the square, from corner to corner.
    back = np.linalg.inv(scale * turn) / FINER
    origin = np.array([left + right, top + bottom]) / 2 - back @ (FINER * (SIDE / 2 + shift))
    way = np.column_stack([back, origin]).ravel()
    fine = square.transform((FINER * SIDE,) * 2, Image.Transform.AFFINE, way, Image.Resampling.BILINEAR)
    image = fine.reduce(FINER).filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR)))
    noise = rng.uniform(*NOISE) * rng.standard_normal((SIDE, SIDE))
    return np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8)


@cached
def _fingerprint():
    """Return the version and a digest of all that the images depend on: constants, libraries, fonts."""
    constants = sorted((name, value) for name, value in globals().items() if name.isupper())
    freetype, unicode = PIL.features.version("freetype2"), unicodedata.unidata_version
    made_of = repr((constants, np.__version__, PIL.__version__, freetype, unicode)).encode()
    fonts = b"".join(_font_file(face).read_bytes() for face in range(len(FACES)))
    return f"v{VERSION}-{hashlib.blake2b(made_of + fonts, digest_size=6).hexdigest()}"


def _read(file):
    """Return the glyphs of a cache file, or None if it is missing or damaged."""
    try:
        # Opened here, for where the archive is damaged, numpy 2.4 leaves a file that it opened open.
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            images, labels, characters, faces = (archive[field] for field in Glyphs._fields)
    except Exception:  # zip archives and numpy's headers have many ways to be damaged, and one cure
        return None
    return Glyphs(images, labels, tuple(characters.tolist()), faces)


def _write(glyphs, file):
    with written_whole(file, temporary=file.with_suffix(".tmp")) as handle:
        np.savez(handle, **glyphs._asdict() | {"characters": np.array(glyphs.characters)})
