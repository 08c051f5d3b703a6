"""The options of the PyTorch module: those of an objective, one by one or as one object, shown and compared."""

import inspect
import re
from dataclasses import replace

import pytest
import torch

from tests.integrations.test_torch import numbers, snapshot
from xbm import Compensation, Contrastive, LogQ, MarginMiner, Objective, SupCon
from xbm.integrations.torch import XBM
from xbm.integrations.torch.agreement import checksum
from xbm.options import declared, described

OPTIONS = declared(Objective)


def near(labels, row_labels):
    """Return whether labels differ by 1 at most."""
    return (labels[:, None] - row_labels[None, :]).abs() <= 1


def equal(labels, row_labels):
    """Return whether labels are equal."""
    return labels[:, None] == row_labels[None, :]


def rare(labels, row_labels):
    """Return the weights of rows of odd labels and of even ones."""
    return (1.0 + row_labels % 2)[None, :]


VALUES = {
    "loss": (Contrastive(), Contrastive(neg_margin=0.3)),
    "miner": (MarginMiner(), "hard-negatives"),
    "reduction": ("mean", "sum"),
    "weight": (1.0, 0.5),
    "warmup": (0, 1),
    "settle": (0.5, 1.0),
    "ramp": (0, 3),
    "match": (near, equal),
    "pair_weights": (rare, LogQ(torch.zeros(3))),
    "ignore_label": (1, 2),
    "normalize": (True, False),
    "copies": ("exclude", "replace"),
    "on_nonfinite": ("skip", "raise"),
    "in_batch": (True, False),
    "compensate": (Compensation(), Compensation(returning=True)),
    "block_rows": (3, 5),
}
"""Two values of each option, other than None."""


def test_the_values_are_of_every_option():
    assert list(VALUES) == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_compare_each_option(name):
    """Ranks that differ in an option have other checksums; those that made it anew have the same."""
    one, other = (Objective(**{name: value}) for value in VALUES[name])
    assert checksum(one, torch.float32) != checksum(other, torch.float32)
    assert checksum(one, torch.float32) != checksum(one, torch.float64)
    assert checksum(one, torch.float32) == checksum(Objective(**{name: VALUES[name][0]}), torch.float32)
    if OPTIONS[name].default is None and name != "reduction":  # its default is "mean"
        assert checksum(one, torch.float32) != checksum(Objective(), torch.float32)


def test_ranks_compare_functions_by_name():
    """Not by address: each process has its own."""

    def made(seed):
        def loss(S, positive, negative):
            return (S * positive).sum(dim=1) + seed

        return loss

    checksums = {checksum(Objective(loss=one), torch.float32) for one in (made(1), made(2), near)}
    assert len(checksums) == 2


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_is_shown(name):
    """One that is None is not."""
    for value in VALUES[name]:
        module = XBM(4, 8, **{name: value})
        kept = module.objective.values()
        for option, one in kept.items():
            assert (f"{option}={one!r}" in module.extra_repr()) is (one is not None), option
        assert kept[name] is not None or name == "reduction"  # the loss shows it
    assert "reduction='sum'" in str(XBM(4, 8, reduction="sum"))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_objective_is_its_options(name):
    value, history = VALUES[name][1], list(numbers(0, 5))
    each = XBM(4, 16, **({"warmup": 1} | {name: value}))
    whole = XBM(4, 16, objective=Objective(**({"warmup": 1} | {name: value})))
    assert whole.objective == each.objective
    assert str(whole) == str(each)
    for x, labels, ids in history:
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        losses = [module(leaf, labels, ids=ids) for module, leaf in ((each, mine), (whole, theirs))]
        torch.stack(losses).sum().backward()
        assert torch.equal(*losses)
        assert torch.equal(mine.grad, theirs.grad)
    held = snapshot(each)
    assert held.keys() == snapshot(whole).keys()
    for buffer, one in snapshot(whole).items():
        assert buffer == "marker" or torch.equal(one.nan_to_num(), held[buffer].nan_to_num()), buffer


@pytest.mark.parametrize("name", OPTIONS)
def test_an_objective_and_an_option_are_refused(name):
    with pytest.raises(ValueError, match=rf"the objective or its options, not both: got objective= and {name}="):
        XBM(4, 8, objective=Objective(), **{name: VALUES[name][1]})


def test_what_is_no_objective_is_refused():
    with pytest.raises(ValueError, match=r"got objective= and loss=, weight="):
        XBM(4, 8, "supcon", objective=Objective(), weight=2.0)
    with pytest.raises(TypeError, match=r"objective must be an xbm.Objective, got SupCon\(temperature=0.1\)"):
        XBM(4, 8, objective=SupCon())


class Learned(torch.nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, S, positive, negative):
        return (self.scale * (1 - S) * positive).sum(dim=1) + (S.relu() * negative).sum(dim=1)


class Near(torch.nn.Module):
    """A relation as a module."""

    def forward(self, labels, row_labels):
        return near(labels, row_labels)


def test_modules_of_an_objective_become_submodules():
    loss, match = Learned(), Near()
    one, other = XBM(4, 8, loss, match=match), XBM(4, 8, objective=Objective(loss=loss, match=match))
    for module in (one, other):
        assert dict(module.named_children()) == {"loss": loss, "match": match}
        assert list(module.parameters()) == [loss.scale]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("wieght", "weight"), ("warm_up", "warmup"), ("block_row", "block_rows"), ("objectiv", "objective")],
)
def test_a_misspelt_option_names_the_nearest(wrong, right):
    with pytest.raises(TypeError, match=f"XBM has no option '{wrong}': did you mean '{right}'?"):
        XBM(4, 8, **{wrong: 2})


def test_an_option_like_none_lists_all():
    with pytest.raises(TypeError, match="XBM has no option 'zzz': it has ") as refusal:
        XBM(4, 8, zzz=2)
    listed = re.search("it has (.*)", str(refusal.value))[1].split(", ")
    assert listed == sorted({*OPTIONS, *("dim", "capacity", "objective", "dtype", "embed", "device", "shard", "group")})


@pytest.mark.parametrize("of", [XBM, XBM.__init__], ids=["class", "init"])
def test_the_signature_shows_every_option(of):
    parameters = inspect.signature(of).parameters
    for name, option in OPTIONS.items():
        assert parameters[name].default == (None if name == "loss" else option.default)
        assert parameters[name].kind is (
            inspect.Parameter.POSITIONAL_OR_KEYWORD if name == "loss" else inspect.Parameter.KEYWORD_ONLY
        )
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def test_the_docstring_describes_every_option():
    assert "{options}" not in XBM.__doc__ + Objective.__doc__
    for name in OPTIONS:
        assert len(re.findall(rf"^{name} : ", inspect.getdoc(XBM), re.MULTILINE)) == 1, name
    assert described(Objective, only=tuple(name for name in OPTIONS if name != "loss")) in inspect.getdoc(XBM)


def test_blocks_of_any_size_give_the_same():
    """Of what `block_rows` says, and no larger ones."""
    widths, modules = [], [XBM(4, 40, "supcon", warmup=0, block_rows=size) for size in (None, 7, 40)]

    def watched(labels, row_labels):
        widths.append(len(row_labels))
        return equal(labels, row_labels)

    for x, labels, ids in numbers(0, 8):
        losses = [module(x, labels, ids=ids) for module in modules]
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(losses[2], losses[0])
    seen = modules[1]
    seen.objective = replace(seen.objective, match=watched)
    seen(x, labels, ids=ids)
    assert max(widths) == 7


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [(0, ValueError, "block_rows must be at least 1"), (2.5, TypeError, "block_rows must be an int")],
)
def test_a_bad_block_is_refused(value, error, sentence):
    with pytest.raises(error, match=sentence):
        XBM(4, 8, block_rows=value)
