"""Options: declared once, checked when an object is made, and passed on by whoever takes `**options`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, Literal, Optional, get_type_hints

import numpy as np
import pytest

import xbm
from xbm import checks, options
from xbm.losses import LossLike, PairReduction
from xbm.mining import MinerLike
from xbm.objective import Options, objective_of
from xbm.options import accepts, choice, declared, described, documented, function, instance, kind_of, number, option
from xbm.relation import EQUALITY, OfLabels

DECLARED = {xbm.Objective: declared(xbm.Objective), xbm.Compensation: declared(xbm.Compensation)}


@documented
@dataclass(frozen=True, kw_only=True)
class Tree(options.Options):
    """A tree.

    Parameters
    ----------
    {options}
    """

    height: float = option(1.0, checks.positive, "Metres, above 0.")
    rings: int = option(
        3,
        options.whole(at_least=1),
        """Years,
        one for each ring.""",
    )
    lean: float | None = option(None, number(at_least=0), "Degrees.")
    fruit: Literal["apple", "pear"] = option("apple", choice("apple", "pear"), "What it bears.")
    evergreen: bool = option(False, checks.flag, "Whether it keeps its leaves.")
    soil: bytes = option(b"loam", instance(bytes, "bytes"), "What it stands in.")
    prune: Callable[[Any], Any] = option(len, function("branches"), "Who cuts it.")


@accepts(Tree)
class Orchard:
    """Trees.

    Parameters
    ----------
    size : int
    {options}
    """

    def __init__(self, size: int, height: float = 2.0, **more: Any) -> None:
        self.size, self.tree = size, Tree(height=height, **more)


# The declarations of this library.


def test_the_options_for_type_checkers_are_those_declared():
    """And of the same types, so that a checker says of `XBM(...)` what it says of `Objective(...)`."""
    declared_kinds, kinds = get_type_hints(xbm.Objective), get_type_hints(Options)
    assert {*kinds} == {*DECLARED[xbm.Objective]} - {"loss"}
    assert {name: declared_kinds[name] for name in kinds} == kinds


@pytest.mark.parametrize("owner", DECLARED, ids=lambda owner: owner.__name__)
def test_every_option_is_described_and_in_the_signature(owner):
    assert "{options}" not in owner.__doc__
    parameters = inspect.signature(owner).parameters
    assert {*parameters} == {*DECLARED[owner]}
    for name, one in DECLARED[owner].items():
        assert one.metadata["description"].strip()
        assert f"\n{name} : " in owner.__doc__
        assert parameters[name].default == one.default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_module_takes_every_option():
    pytest.importorskip("torch")
    from xbm.integrations.torch import XBM

    parameters = inspect.signature(XBM).parameters
    assert "{options}" not in XBM.__doc__
    assert not any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name, one in DECLARED[xbm.Objective].items():
        assert XBM.__doc__.count(f"\n{name} : ") == 1
        if name != "loss":  # positional there, and left out beside `objective`
            assert parameters[name].default == one.default
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(TypeError, match="XBM has no option 'wieght': did you mean 'weight'"):
        XBM(8, 16, wieght=0.5)


def test_an_objective_or_its_options_not_both():
    objective = xbm.Objective(weight=0.5)
    assert objective_of(objective, None, {}) is objective
    assert objective_of(None, None, {"weight": 0.5}) == objective
    assert objective_of(None, "supcon", {}).loss == xbm.SupCon()
    for loss, more, names in ((None, {"warmup": 3}, "warmup="), ("supcon", {"ramp": 1}, "loss=, ramp=")):
        with pytest.raises(ValueError, match=f"not both: got objective= and {names}$"):
            objective_of(objective, loss, more)
    with pytest.raises(TypeError, match=r"objective must be an xbm.Objective, got 3"):
        objective_of(3, None, {})


def test_an_objective_is_made_again_with_other_options():
    objective = xbm.Objective(loss="contrastive", reduction="sum", miner=["margin", "semi-hard"], settle=0.1)
    again = replace(objective, weight=0.5)
    assert again.loss == objective.loss == xbm.Contrastive(reduction="sum")
    assert again.miners == objective.miners == (xbm.MarginMiner(), xbm.SemiHardMiner())
    assert repr(again.criterion) == repr(objective.criterion)
    assert (again.weight, again.settle, objective.weight) == (0.5, 0.1, 1.0)
    assert replace(again, weight=1.0) == objective == xbm.Objective(**objective.values())
    assert replace(objective, loss="supcon", miner=None).criterion == xbm.SupCon()
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        replace(objective, weight=-1)


@pytest.mark.parametrize(
    "made",
    [xbm.Objective(), xbm.Compensation(), EQUALITY, Tree(height=1), xbm.Contrastive()],
    ids=lambda one: type(one).__name__,
)
def test_an_object_cannot_be_changed(made):
    before = repr(made)
    for name in [*inspect.signature(type(made)).parameters, "another"]:
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, 1)
    assert repr(made) == before


# The checks.


@pytest.mark.parametrize(
    ("name", "value", "error", "sentence"),
    [
        ("height", 0, ValueError, "height must be above 0, got 0"),
        ("height", "tall", TypeError, "height must be a number, got 'tall' of type str"),
        ("height", True, TypeError, "height must be a number, got True"),
        ("height", None, TypeError, "height must be a number, got None"),
        ("rings", 0, ValueError, "rings must be at least 1, got 0"),
        ("rings", 1.5, TypeError, "rings must be an int, got 1.5"),
        ("rings", None, TypeError, "rings must be an int, got None"),
        ("lean", -1, ValueError, "lean must be at least 0, got -1"),
        ("lean", float("inf"), ValueError, "lean must be a finite number, got inf"),
        ("fruit", "plum", ValueError, "fruit must be 'apple' or 'pear', got 'plum'"),
        ("evergreen", 1, TypeError, "evergreen must be True or False, got 1"),
        ("soil", "loam", TypeError, "soil must be bytes, got 'loam'"),
        ("prune", 3, TypeError, r"prune must be callable as prune\(branches\), got 3"),
    ],
)
def test_a_check_names_the_option(name, value, error, sentence):
    with pytest.raises(error, match=sentence):
        Tree(**{"height": 1.0} | {name: value})


def test_none_is_not_checked_where_it_is_the_default():
    assert Tree(height=1.0, lean=None).lean is None


def test_numpys_numbers_become_plain_ones():
    """NumPy's own would widen what they meet."""
    tree = Tree(height=np.float32(2), rings=np.int64(4), lean=np.float64(1))
    assert [type(one) for one in (tree.height, tree.rings, tree.lean)] == [float, int, float]
    assert (tree.height, tree.rings, tree.lean) == (2.0, 4, 1.0)
    objective = xbm.Objective(
        weight=np.float32(0.5), warmup=np.int32(3), ramp=np.int8(2), settle=np.float64(0.1), ignore_label=np.uint8(7)
    )
    kinds = {"weight": float, "warmup": int, "ramp": int, "settle": float, "ignore_label": int}
    assert {name: type(getattr(objective, name)) for name in kinds} == kinds
    assert type(Tree(height=1).height) is float


# Passed on.


def test_a_class_that_passes_options_on_shows_them():
    parameters = inspect.signature(Orchard).parameters
    assert [*parameters] == ["size", "height", "rings", "lean", "fruit", "evergreen", "soil", "prune"]
    assert parameters["height"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD  # its own
    assert {parameters[name].kind for name in ("rings", "prune")} == {inspect.Parameter.KEYWORD_ONLY}
    assert (parameters["height"].default, parameters["rings"].default, parameters["lean"].default) == (2.0, 3, None)
    assert "\nrings : int\n    Years, one for each ring.\n" in Orchard.__doc__
    assert "height :" not in Orchard.__doc__  # the class describes its own parameters
    assert Orchard(3, rings=5).tree == Tree(height=2.0, rings=5)
    assert Orchard(3, 4.0).tree.height == 4.0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ring", "did you mean 'rings'"),
        ("siez", "did you mean 'size'"),
        ("evergeen", "did you mean 'evergreen'"),
        ("xyz", "it has evergreen, fruit, height, lean, prune, rings, size, soil$"),
    ],
)
def test_a_misspelt_option_names_the_nearest(name, hint):
    with pytest.raises(TypeError, match=f"^Orchard has no option '{name}': {hint}"):
        Orchard(3, **{name: 1})


# The documentation.


def test_options_are_described_in_numpydocs_words():
    assert described(Tree).split("\n") == [
        "height : float",
        "    Metres, above 0.",
        "rings : int",
        "    Years, one for each ring.",
        "lean : float, optional",
        "    Degrees.",
        'fruit : {"apple", "pear"}',
        "    What it bears.",
        "evergreen : bool",
        "    Whether it keeps its leaves.",
        "soil : bytes",
        "    What it stands in.",
        "prune : callable",
        "    Who cuts it.",
    ]
    assert described(Tree, only=("rings",)) == "rings : int\n    Years, one for each ring."
    assert described(Tree) in Tree.__doc__


def test_descriptions_are_wrapped():
    for owner in DECLARED:
        assert max(map(len, described(owner).split("\n"))) <= 120
        assert not any(line != line.rstrip() for line in described(owner).split("\n"))


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "int"),
        (float | None, "float, optional"),
        (Optional[bool], "bool, optional"),  # noqa: UP045
        (Literal["exclude", "keep"], '{"exclude", "keep"}'),
        (PairReduction | None, '{"mean", "mean-nonzero", "sum"}, optional'),
        (Callable[[Any, Any], Any], "callable"),
        (OfLabels | None, "callable, optional"),
        (list[int], "list"),
        (Sequence[str], "list"),
        (str | int | float, "str, int or float"),
        (LossLike, "str, RowLoss or callable"),
        (MinerLike, "Miner, str or list, optional"),
        (xbm.Compensation | None, "Compensation, optional"),
    ],
)
def test_kinds_of_annotations(annotation, words):
    assert kind_of(annotation) == words
