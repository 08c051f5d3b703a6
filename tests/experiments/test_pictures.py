"""The user's own pictures: which files are read, which are ignored, and which raise an error."""

import re

import numpy as np
import pytest
from PIL import Image

from xbm.experiments import pictures
from xbm.experiments.errors import InputError
from xbm.experiments.pictures import Pictures


def gradient(*shape, offset=0):
    return (np.arange(np.prod(shape)) * 7 + offset).reshape(shape).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two classes, cat and dog, of two grey pictures each, 6 x 4."""
    for i, name in enumerate(("dog", "cat")):
        (tmp_path / name).mkdir()
        for j in range(2):
            Image.fromarray(gradient(4, 6, offset=2 * i + j)).save(tmp_path / name / f"{j}.png")
    return tmp_path


def npz(folder, **arrays):
    np.savez(folder / "own.npz", **arrays)
    return folder / "own.npz"


def test_a_folder_of_class_folders(folder):
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / "cat" / ".hidden.png").write_text("no picture either")
    (folder / ".git").mkdir()
    (folder / "README.md").write_text("beside the classes")
    found = pictures.load(folder)
    assert found.names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images[:, 0], [gradient(4, 6, offset=i) for i in (2, 3, 0, 1)])


def test_one_colour_picture_makes_all_of_three_channels(folder):
    colour = gradient(4, 6, 3)
    Image.fromarray(colour).save(folder / "dog" / "1.png")
    found = pictures.load(folder)
    assert found.images.shape == (4, 3, 4, 6)
    np.testing.assert_array_equal(found.images[3], np.moveaxis(colour, -1, 0))
    np.testing.assert_array_equal(found.images[0], [gradient(4, 6, offset=2)] * 3)


def test_transparent_pictures_are_laid_on_white(folder):
    picture = gradient(4, 6, 4)
    picture[..., 3] = 0
    picture[0, 0] = 10, 20, 30, 255
    Image.fromarray(picture).save(folder / "dog" / "1.png")
    found = pictures.load(folder).images[3]
    assert found[:, 0, 0].tolist() == [10, 20, 30]
    assert (found[:, 1:] == 255).all()


def test_a_camera_s_rotation_is_heeded(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: rotated by 90 degrees
    Image.fromarray(gradient(6, 4)).save(folder / "dog" / "1.png", exif=exif)
    np.testing.assert_array_equal(pictures.load(folder).images[3, 0], np.rot90(gradient(6, 4), -1))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_an_npz(tmp_path, shape):
    images = np.stack([gradient(*shape, offset=i) for i in range(5)])
    found = pictures.load(npz(tmp_path, images=images, labels=np.array([7, -3, 7, -3, 7], np.int8)))
    assert found.names == ("-3", "7")
    assert (found.labels.dtype, found.labels.tolist()) == (np.int64, [1, 0, 1, 0, 1])
    assert found.images.shape == (5, 3 if len(shape) == 3 and shape[-1] == 3 else 1, 4, 6)
    np.testing.assert_array_equal(np.moveaxis(found.images, 1, -1).reshape(images.shape), images)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_resized_alike_from_either(folder, tmp_path, shape):
    images = np.stack([gradient(*shape, offset=i) for i in range(4)])
    found = pictures.load(npz(tmp_path, images=images, labels=np.array(["cat", "cat", "dog", "dog"])), size=5)
    for i, image in enumerate(images):
        Image.fromarray(image.reshape(shape if shape[-1] == 3 else shape[:2])).save(
            folder / ("cat", "dog")[i // 2] / f"{i % 2}.png"
        )
    assert found.images.shape[2:] == (5, 5)
    same = pictures.load(folder, size=5)
    np.testing.assert_array_equal(same.images, found.images)
    assert same.fingerprint() == found.fingerprint()


def test_the_fingerprint_tells_every_change(folder):
    before = pictures.load(folder)
    images = before.images.copy()
    images[-1, -1, -1, -1] ^= 1
    changed = [
        before._replace(images=images),
        before._replace(labels=before.labels[::-1].copy()),
        before._replace(names=("cat", "fox")),
        before._replace(images=before.images.swapaxes(2, 3).copy()),
    ]
    assert len({one.fingerprint() for one in (before, *changed)}) == 5
    assert before.fingerprint() == pictures.load(folder).fingerprint()


def test_some_classes_are_numbered_anew():
    whole = Pictures(gradient(6, 1, 2, 2), np.array([2, 0, 1, 2, 0, 1]), ("a", "b", "c"))
    part = whole.of(["c", "a"])
    assert part.names == ("c", "a")
    assert part.labels.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(part.images, whole.images[[0, 1, 3, 4]])


def test_groups_of_classes(tmp_path):
    arrays = {"images": gradient(6, 2, 2), "labels": np.array([5, 6, 7] * 2), "script": np.array([1, 0, 1] * 2)}
    path = npz(tmp_path, **arrays)
    assert pictures.groups(path, "script", pictures.load(path)).tolist() == [1, 0, 1]
    arrays["script"][0] = 0
    with pytest.raises(InputError, match="one group of script, class '5' is in 0 and 1"):
        pictures.groups(npz(tmp_path, **arrays), "script", pictures.load(path))


def test_groups_need_an_array_of_their_own(tmp_path, folder):
    path = npz(tmp_path, images=gradient(4, 2, 2), labels=np.array([0, 0, 1, 1]), half=np.zeros(2, int))
    own = pictures.load(path)
    for name, sentence in (
        ("script", "no array script: its arrays are images, labels, half"),
        ("half", "must be 4 integers"),
    ):
        with pytest.raises(InputError, match=sentence):
            pictures.groups(path, name, own)
    with pytest.raises(InputError, match=r"--split-by script needs an \.npz"):
        pictures.groups(folder, "script", own)


def cut_short(file):
    file.write_bytes(file.read_bytes()[: -len(file.read_bytes()) // 3])


def of_another_size(file):
    Image.fromarray(gradient(4, 7)).save(file)


def of_16_bits(file):
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(file)


def no_picture(file):
    file.write_text("words")


def a_folder(file):
    file.unlink()
    file.mkdir()


def dangling(file):
    file.unlink()
    file.symlink_to("nothing")


def missing(file):
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_short, r"dog/1\.png cannot be read as a picture: .*truncated"),
        (no_picture, r"dog/1\.png cannot be read as a picture: cannot identify image file it$"),
        (dangling, r"dog/1\.png cannot be read as a picture: .*No such file"),
        (of_16_bits, r"dog/1\.png must have 8 bits per channel, got more \(Pillow mode I;16\)"),
        (of_another_size, r"cat/0\.png is 6 x 4 and .*dog/1\.png is 7 x 4: resize them with --size"),
        (a_folder, r"class folder .*dog contains a folder, 1\.png: expected picture files only"),
        (missing, r"every class needs at least 2 pictures, class 'dog' has fewer \(1\)$"),
    ],
)
def test_a_bad_file_is_named(folder, damage, sentence):
    damage(folder / "dog" / "1.png")
    with pytest.raises(InputError, match=sentence):
        pictures.load(folder)


@pytest.mark.parametrize("side", [1, 100])
def test_size_brings_pictures_of_any_size_together(folder, side):
    of_another_size(folder / "dog" / "1.png")
    assert pictures.load(folder, size=side).images.shape == (4, 1, side, side)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        pictures.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="contains no subfolders: expected one per class"):
        pictures.load(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"no pictures found in the subfolders of .* \(1 subfolders\)"):
        pictures.load(tmp_path)


GOOD = {"images": gradient(4, 3, 3), "labels": np.array([0, 0, 1, 1])}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": None}, "has no array images: its arrays are labels"),
        ({"images": None, "labels": None}, "has no array images and no array labels: its arrays are none"),
        ({"images": np.array([None] * 4)}, "cannot be read as an .npz of plain arrays: Object arrays"),
        ({"labels": np.array([0, 0, 1, None])}, "cannot be read as an .npz of plain arrays: Object arrays"),
        ({"images": gradient(4, 3)}, r"images .* must be uint8 of shape .*, got uint8 of shape \(4, 3\)"),
        ({"images": gradient(4, 3, 3, 2)}, r"got uint8 of shape \(4, 3, 3, 2\)"),
        ({"images": gradient(4, 3, 3).astype(float)}, r"got float64 of shape \(4, 3, 3\)"),
        (
            {"images": gradient(0, 3, 3), "labels": np.array([], int)},
            "contains no pictures: images has shape",
        ),
        ({"labels": np.array([0, 0, 1])}, r"must be 4 integers or strings, .*, got int64 of shape \(3,\)"),
        ({"labels": np.array([0.0, 0, 1, 1])}, "got float64"),
        (
            {"labels": np.array([0, 1, 2, 3])},
            r"class '0' has fewer \(1\), as do 3 other classes$",
        ),
    ],
)
def test_an_npz_that_does_not_fit(tmp_path, change, sentence):
    path = npz(tmp_path, **{name: array for name, array in (GOOD | change).items() if array is not None})
    with pytest.raises(InputError, match=sentence):
        pictures.load(path)


def an_npy(file):
    with file.open("wb") as handle:
        np.save(handle, np.arange(3))


@pytest.mark.parametrize("damage", [cut_short, no_picture, an_npy])
def test_no_npz(tmp_path, damage):
    path = npz(tmp_path, **GOOD)
    damage(path)
    with pytest.raises(InputError, match=re.escape(f"{path} cannot be read as an .npz of plain arrays")):
        pictures.load(path)
