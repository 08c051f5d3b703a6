"""The split: every class is in one part, groups stay together, and equal seeds give equal splits."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbm.experiments.errors import InputError
from xbm.experiments.split import split


@given(st.integers(6, 200), st.integers(0, 9))
def test_every_class_is_in_one_part(count, seed):
    names = [f"class {i}" for i in range(count)]
    parts = split(names, seed=seed)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(chain(*parts.values())) == sorted(names)
    assert all(part == sorted(part, key=names.index) for part in parts.values())
    assert min(map(len, parts.values())) >= 2
    assert abs(len(parts["test"]) - 0.4 * count) <= 0.5
    assert abs(len(parts["validation"]) - max(2, 0.1 * count)) <= 0.5
    assert parts == split(names, seed=seed)


def test_a_seed_is_a_split():
    names = [str(i) for i in range(40)]
    assert split(names, seed=0) != split(names, seed=1)


@given(st.data())
def test_groups_stay_whole(data):
    count = data.draw(st.integers(3, 20))
    group = np.array(data.draw(st.permutations([*range(count), *range(count)])))  # two classes per group
    names = [str(i) for i in range(len(group))]
    parts = split(names, seed=data.draw(st.integers(0, 9)), groups=group, by="script")
    groups = [{group[int(name)] for name in part} for part in parts.values()]
    assert sum(map(len, groups)) == count == len(set.union(*groups))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_classes(count):
    with pytest.raises(InputError, match=rf"^{count} classes are too few to split: .* got \d+ for train"):
        split([str(i) for i in range(count)])


@pytest.mark.parametrize("groups", [[0] * 9, [0] * 4 + [1] * 5, [0] * 4 + [1] * 4 + [2]])
def test_too_few_groups(groups):
    with pytest.raises(InputError, match=rf"9 classes in {len(set(groups))} groups of script are too few to split"):
        split([str(i) for i in range(9)], groups=np.array(groups), by="script")
