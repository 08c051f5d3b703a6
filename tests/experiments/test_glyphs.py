"""The demo's data: its contents, and a cache that handles damaged files, unusable folders and concurrent processes."""

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import xbm
from xbm.experiments import glyphs

ALPHA, CYRILLIC_A = "\N{GREEK CAPITAL LETTER ALPHA}", "\N{CYRILLIC CAPITAL LETTER A}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quick(folder):
    return glyphs.load(quick=True, cache=folder)


def cache_file(folder):
    """Return the only cache file of a folder."""
    (file,) = Path(folder).glob("*.npz")
    return file


def assert_same(left, right):
    for field, a, b in zip(left._fields, left, right, strict=True):
        assert type(a) is type(b), field
        assert np.asarray(a).dtype == np.asarray(b).dtype, field
        np.testing.assert_array_equal(a, b, err_msg=field)


def test_shapes_and_types(quick):
    n = len(quick.labels)
    assert (quick.images.shape, quick.images.dtype) == ((n, 28, 28), np.uint8)
    for column in (quick.labels, quick.faces):
        assert (column.shape, column.dtype) == ((n,), np.int64)
    assert len(quick.characters) == len(set(quick.characters)) == glyphs.QUICK_CLASSES
    np.testing.assert_array_equal(np.unique(quick.labels), np.arange(glyphs.QUICK_CLASSES))


def test_a_class_has_an_image_from_each_of_at_least_twelve_faces(quick):
    assert np.bincount(quick.labels).min() >= 12
    assert len(np.unique(quick.labels * len(glyphs.FACES) + quick.faces)) == len(quick.labels)


def test_ink_is_high_visible_and_inside(quick):
    corners = quick.images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.median(corners) < 20  # paper
    assert quick.images.max(axis=(1, 2)).min() > 80  # no blank image
    border = [quick.images[:, 0], quick.images[:, -1], quick.images[:, :, 0], quick.images[:, :, -1]]
    assert np.max(border) < 200  # blur and noise reach the border, ink does not


def test_no_two_images_share_their_noise(quick):
    first_rows = quick.images[quick.images[:, 0].any(axis=1), 0]
    assert len(np.unique(first_rows, axis=0)) == len(first_rows) > 0.9 * len(quick.images)


def test_distortions_turn_move_and_scale_the_ink():
    upright, rng = glyphs._upright(0, "|"), np.random.default_rng(0)
    ink = np.stack([glyphs._distort(upright, rng) for _ in range(300)]) > 100  # above the noise
    area = ink.sum(axis=(1, 2))
    down, right = np.mgrid[:28, :28] - 13.5
    middle = np.stack([(ink * down).sum(axis=(1, 2)), (ink * right).sum(axis=(1, 2))], axis=1) / area[:, None]
    lean = np.rad2deg([np.arctan(np.polyfit(down[image], right[image], 1)[0]) for image in ink])
    assert abs(lean.mean()) < 2
    assert 20 < np.abs(lean).max() < 28  # 15 degrees of rotation and 11 of shear
    assert middle.std(axis=0).min() > 0.5
    assert np.abs(middle).max() < 3  # 2 pixels, and a margin for noise
    assert area.std() / area.mean() > 0.05


def test_rendering_again_gives_what_the_cache_holds(quick, folder):
    before = cache_file(folder).stat().st_mtime_ns
    assert_same(glyphs.load(quick=True, cache=folder), quick)
    assert cache_file(folder).stat().st_mtime_ns == before  # read, not made again
    assert_same(glyphs.render(quick=True), quick)


def test_quick_is_part_of_the_whole(quick, tmp_path):
    glyphs.load(quick=True, cache=tmp_path)
    whole = glyphs.load(cache=tmp_path)  # the only slow test: it renders everything
    assert 1700 < len(whole.characters) < 1900
    assert np.bincount(whole.labels).min() >= 12
    old = np.array([whole.characters.index(character) for character in quick.characters])
    kept = np.isin(whole.labels, old)
    np.testing.assert_array_equal(whole.images[kept], quick.images)
    np.testing.assert_array_equal(whole.labels[kept], old[quick.labels])


def test_a_cache_that_is_there_needs_no_lock(quick, folder, tmp_path):
    file = tmp_path / cache_file(folder).name
    file.write_bytes(cache_file(folder).read_bytes())
    Path(f"{file}.lock").mkdir()  # the lock cannot be acquired, as in a read-only folder
    with warnings.catch_warnings(action="error"):
        assert_same(glyphs.load(quick=True, cache=tmp_path), quick)


def test_lookalikes_are_one_class(quick):
    assert glyphs.lookalikes(["A", "B", ALPHA, CYRILLIC_A, "!"]).tolist() == [0, 1, 0, 0, 4]
    np.testing.assert_array_equal(glyphs.lookalikes(quick.characters), np.arange(glyphs.QUICK_CLASSES))


def test_lookalikes_are_joined_through_a_third():
    # Z with acute looks like Z with dot in Sans and like Z with caron in Serif; dot and caron look alike in neither.
    acute, dot, caron = "\u0179\u017b\u017d"
    assert glyphs.lookalikes([dot, caron]).tolist() == [0, 1]
    assert glyphs.lookalikes([dot, caron, acute]).tolist() == [0, 0, 0]
    assert glyphs.lookalikes([caron, acute, dot]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_split_keeps_every_image_and_shares_no_class(quick, seed):
    parts = train, test = glyphs.split(quick, seed=seed)
    assert (len(train.characters), len(test.characters)) == (72, 48)
    assert sorted(train.characters + test.characters) == sorted(quick.characters)
    for part in parts:
        np.testing.assert_array_equal(np.unique(part.labels), np.arange(len(part.characters)))
        for label, character in enumerate(part.characters):
            new, old = part.labels == label, quick.labels == quick.characters.index(character)
            np.testing.assert_array_equal(part.images[new], quick.images[old])
            np.testing.assert_array_equal(part.faces[new], quick.faces[old])


def test_split_follows_its_seed(quick):
    assert_same(glyphs.split(quick, seed=1)[0], glyphs.split(quick, seed=1)[0])
    assert glyphs.split(quick, seed=1)[0].characters != glyphs.split(quick, seed=0)[0].characters


@pytest.mark.parametrize("train", [0.0, 0.004, 1.0, -1.0])
def test_split_refuses_an_empty_side(quick, train):
    with pytest.raises(ValueError, match=rf"train={train} of 120 classes"):
        glyphs.split(quick, train=train)


def cut_short(content):
    return content[: len(content) // 2]


def one_bit_off(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(content):
    return b""


@pytest.mark.parametrize("damage", [cut_short, one_bit_off, emptied])
def test_a_damaged_file_is_made_again(quick, folder, tmp_path, damage):
    file = tmp_path / cache_file(folder).name
    whole = cache_file(folder).read_bytes()
    file.write_bytes(damage(whole))
    file.with_suffix(".tmp").write_bytes(b"left by a run that was killed")
    assert_same(glyphs.load(quick=True, cache=tmp_path), quick)
    with np.load(file, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["images"], quick.images)
    assert not list(tmp_path.glob("*.tmp"))


RUN = """
import hashlib, sys
from xbm.experiments import glyphs
render, drawn = glyphs.render, []
glyphs.render = lambda **options: drawn.append(1) or render(**options)
print("ready", flush=True)
sys.stdin.readline()
images = glyphs.load(quick=True, cache=sys.argv[1]).images
print(hashlib.sha256(images).hexdigest(), len(drawn))
"""


def test_two_processes_at_once_make_one_file(quick, tmp_path):
    path = os.pathsep.join(filter(None, [str(Path(xbm.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RUN, tmp_path]
    runs = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    digests, drawn = zip(*(run.communicate(timeout=120)[0].split() for run in runs), strict=True)
    assert set(digests) == {hashlib.sha256(quick.images).hexdigest()}
    assert sorted(drawn) == ["0", "1"]  # one process renders, the other waits for it
    with warnings.catch_warnings(action="error"):
        assert_same(glyphs.load(quick=True, cache=tmp_path), quick)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".npz", ".lock"}  # no partial files


def test_a_folder_that_cannot_be_made_is_warned_of(quick, tmp_path):
    (tmp_path / "taken").write_text("a file, so there can be no folder below it")
    with pytest.warns(UserWarning, match=r"Cannot cache the glyphs in .*taken") as caught:
        assert_same(glyphs.load(quick=True, cache=tmp_path / "taken" / "xbm"), quick)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(quick, folder, tmp_path):
    (tmp_path / cache_file(folder).name).mkdir()
    with pytest.warns(UserWarning, match="Cannot cache the glyphs"):
        assert_same(glyphs.load(quick=True, cache=tmp_path), quick)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_warned_of(quick, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match="Cannot cache the glyphs"):
        assert_same(glyphs.load(quick=True, cache=tmp_path), quick)


def test_the_file_name_follows_the_constants(monkeypatch):
    before = glyphs._fingerprint.__wrapped__()
    assert glyphs._fingerprint.__wrapped__() == before
    monkeypatch.setattr(glyphs, "SHEAR", 0.1)
    assert glyphs._fingerprint.__wrapped__() != before
