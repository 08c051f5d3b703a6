"""The demo's data: the characters of sixteen typefaces, randomly distorted, blurred and noisy. No download needed.

The faces are those that matplotlib installs. A class is a character; an instance is the character in one face under
one random distortion. This gives many classes with few images each, the setting a memory is made for. Splitting the
classes into training and test classes makes it a zero-shot retrieval task, the usual benchmark of metric learning.
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

# Content. The cache file's name depends on all upper-case constants, so changing one renders the glyphs again.
VERSION = 1  # increment when a change of the code below changes the images
FACES = (
    *("DejaVuSans" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *("DejaVuSansMono" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *("DejaVuSerif" + style for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *("STIXGeneral" + style for style in ("", "Bol", "Italic", "BolIta")),
)
LEAST_FACES = 12  # minimum number of images per class
QUICK_CLASSES = 120
LOOKALIKE_FACES = (FACES.index("DejaVuSans"), FACES.index("DejaVuSerif"))
LOOKALIKE_SIDE = 24  # pixels; the characters are compared in squares of this side
LOOKALIKE_CORRELATION = 0.97  # above this correlation, two characters form one class

# Distortion. Each image draws its own values, uniformly from [-x, x] or from the given range.
SEED = 0
SIDE = 28  # pixels
INK = 22.0  # pixels; longer side of the ink before the distortion
EDGE = 1.0  # pixels; minimum distance of the ink from the border
ROTATION = 15.0  # degrees
SHEAR = 0.2  # pixels sideways per pixel of height
SCALE = (0.8, 1.15)
SHIFT = 2.0  # pixels; less if the border is nearer
BLUR = (0.0, 1.0)  # pixels; standard deviation of a Gaussian
NOISE = (0.0, 25.0)  # grey levels of 255; standard deviation

# Drawing: large and undistorted first, then resampled once on a grid FINER times as fine as the image's.
FONT_SIZES = (64, 160, 512)  # pixels per em; the first size whose ink is at least LEAST_INK pixels long is used
LEAST_INK = 40
MARGIN = 1.15  # side of the drawn square relative to the ink's longer side
FINER = 3


class Glyphs(NamedTuple):
    """Images of characters, sorted by class and then by face (n images, C classes)."""

    images: np.ndarray  # (n, 28, 28) uint8, paper 0, ink 255
    labels: np.ndarray  # (n,) int64, 0 .. C - 1
    characters: tuple[str, ...]  # C characters, one per class
    faces: np.ndarray  # (n,) int64, index into `FACES`


def load(*, quick=False, cache=None):
    """Return the glyphs, from the cache if possible; else render and cache them.

    There are about 1,790 classes and 24,400 images, the same at every call. A class has one image for each face that
    contains its character, at least `LEAST_FACES`. If the cache folder is not writable, a warning is issued and the
    images are rendered, which takes seconds.

    Parameters
    ----------
    quick : bool
        Return only `QUICK_CLASSES` evenly spaced classes, with the same images as in the full set. For tests.
    cache : path, optional
        Cache folder; by default the user's cache folder for xbm.

    """
    folder = user_cache_path("xbm") if cache is None else Path(cache)
    file = folder / f"glyphs-{_fingerprint()}{'-quick' if quick else ''}.npz"
    glyphs = _read(file)  # no lock needed: the file is written atomically
    if glyphs is not None:
        return glyphs
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=300):
            glyphs = _read(file)  # another process may have written it in the meantime
            if glyphs is None:
                glyphs = render(quick=quick)
                _write(glyphs, file)
    except (OSError, NotImplementedError) as problem:  # NotImplementedError: the file system has no locks
        message = f"Cannot cache the glyphs in {folder}, so every run renders them again: {problem!r}."
        warnings.warn(message, stacklevel=2)
    return render(quick=quick) if glyphs is None else glyphs


def split(glyphs, *, train=0.6, seed=0):
    """Return `(train, test)`, two `Glyphs` with no class in common.

    `round(train * C)` random classes of C are for training. Both parts keep the order of the classes and number them
    from 0.

    Raises
    ------
    ValueError
        If one part would have no class.

    """
    count = len(glyphs.characters)
    cut = round(train * count)
    if not 0 < cut < count:
        raise ValueError(
            f"train must be a fraction that gives both parts at least one class, got train={train} of {count} classes"
        )
    order = np.random.default_rng(seed).permutation(count)
    return _subset(glyphs, np.sort(order[:cut])), _subset(glyphs, np.sort(order[cut:]))


def _subset(glyphs, classes):
    """Keep the given classes, in ascending order, and number them from 0."""
    kept = np.isin(glyphs.labels, classes)
    labels = np.searchsorted(classes, glyphs.labels[kept])
    characters = tuple(glyphs.characters[old] for old in classes)
    return Glyphs(glyphs.images[kept], labels, characters, glyphs.faces[kept])


def render(*, quick=False):
    """Render the glyphs, ignoring the cache; see `load`."""
    held = [_characters(face) for face in range(len(FACES))]
    candidates = sorted(c for c in set().union(*held) if sum(c in face for face in held) >= LEAST_FACES)
    # Of look-alikes, keep only the lowest code point: a class with the images of all of them would be larger.
    characters = tuple(candidates[i] for i in np.unique(lookalikes(candidates)))
    if quick:
        characters = characters[:: len(characters) // QUICK_CLASSES][:QUICK_CLASSES]

    images, labels, faces = [], [], []
    for label, character in enumerate(characters):
        # One random stream per character, so that an image does not depend on the other characters.
        rng = np.random.default_rng((SEED, ord(character)))
        for face in [face for face in range(len(FACES)) if character in held[face]]:
            images.append(_distort(_upright(face, character), rng))
            labels.append(label)
            faces.append(face)
    return Glyphs(np.stack(images), np.array(labels, np.int64), characters, np.array(faces, np.int64))


def lookalikes(characters):
    r"""Return, for each of n characters, the index of the first character that looks like it, (n,) int64.

    Two characters look alike if their ink, scaled and centred, correlates above `LOOKALIKE_CORRELATION` in one of
    `LOOKALIKE_FACES`. The relation is transitive: a chain of such pairs joins its ends.

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
        pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)  # nonzero: there is ink with a margin around it
        pairs.append(rows[np.argwhere(pixels @ pixels.T > LOOKALIKE_CORRELATION)])
    left, right = np.concatenate(pairs).T

    # Propagate the smallest index along the pairs until nothing changes (connected components).
    first = np.arange(len(characters))
    while (first[left] != first[right]).any():
        np.minimum.at(first, left, first[right])
    return first


def _font_file(face):
    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FACES[face]}.ttf")


@cached
def _characters(face):
    """Return the set of characters that a face draws with ink, without marks, spaces and controls."""
    with TTFont(_font_file(face)) as font:
        start, id_of = font["loca"], font.getGlyphID  # glyph i's outline is bytes start[i] to start[i + 1]
        inked = {name for name in font.getGlyphOrder()[1:] if start[id_of(name) + 1] > start[id_of(name)]}
        held = [chr(code) for code, name in font.getBestCmap().items() if name in inked]
    return {character for character in held if unicodedata.category(character)[0] not in "MZC"}


@cached
def _font(face, size):
    # Basic layout: otherwise the images depend on whether Pillow finds libraqm.
    return ImageFont.truetype(_font_file(face), size, layout_engine=ImageFont.Layout.BASIC)


def _upright(face, character):
    """Draw a character undistorted, with its ink in the middle of a slightly larger square."""
    for size in FONT_SIZES:
        left, top, right, bottom = _font(face, size).getbbox(character)  # contains the ink, not always tightly
        drawn = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=_font(face, size))
        ink = drawn.crop(drawn.getbbox())
        if max(ink.size) >= LEAST_INK:
            break
    square = Image.new("L", (round(MARGIN * max(ink.size)),) * 2)
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return square


def _distort(square, rng):
    """Rotate, shear, scale, shift and blur an upright character and add noise; return (28, 28) uint8."""
    left, top, right, bottom = square.getbbox()
    ink = np.array([right - left, bottom - top])
    angle, shear = np.deg2rad(rng.uniform(-ROTATION, ROTATION)), rng.uniform(-SHEAR, SHEAR)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    # Keep the corners of the ink's bounding box in the image: limit the scale first, then the shift.
    room = SIDE / 2 - EDGE
    reach = np.abs(turn) @ (ink / 2)
    scale = min(rng.uniform(*SCALE) * INK / ink.max(), room / reach.max())
    shift = rng.uniform(-1, 1, size=2) * np.minimum(SHIFT, room - scale * reach)

    # Pillow expects the inverse map, from the fine grid to the square, both with the origin at the top left corner.
    back = np.linalg.inv(scale * turn) / FINER
    origin = np.array([left + right, top + bottom]) / 2 - back @ (FINER * (SIDE / 2 + shift))
    way = np.column_stack([back, origin]).ravel()
    fine = square.transform((FINER * SIDE,) * 2, Image.Transform.AFFINE, way, Image.Resampling.BILINEAR)
    image = fine.reduce(FINER).filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR)))
    noise = rng.uniform(*NOISE) * rng.standard_normal((SIDE, SIDE))
    return np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8)


@cached
def _fingerprint():
    """Return the version and a digest of everything the images depend on: constants, libraries and fonts."""
    constants = sorted((name, value) for name, value in globals().items() if name.isupper())
    freetype, unicode = PIL.features.version("freetype2"), unicodedata.unidata_version
    made_of = repr((constants, np.__version__, PIL.__version__, freetype, unicode)).encode()
    fonts = b"".join(_font_file(face).read_bytes() for face in range(len(FACES)))
    return f"v{VERSION}-{hashlib.blake2b(made_of + fonts, digest_size=6).hexdigest()}"


def _read(file):
    """Return the glyphs of a cache file, or None if it is missing or damaged."""
    try:
        # Open the file here: numpy 2.4 does not close it if the archive is damaged.
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            images, labels, characters, faces = (archive[field] for field in Glyphs._fields)
    except Exception:  # damaged zip archives and numpy headers raise many types of errors
        return None
    return Glyphs(images, labels, tuple(characters.tolist()), faces)


def _write(glyphs, file):
    with written_whole(file, temporary=file.with_suffix(".tmp")) as handle:
        np.savez(handle, **glyphs._asdict() | {"characters": np.array(glyphs.characters)})
