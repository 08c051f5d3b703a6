"""The training loop: reproducibility, measurements without side effects, and resumption after any step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from xbm.experiments import training
from xbm.experiments.errors import DivergenceError
from xbm.experiments.pictures import load
from xbm.experiments.plan import PRECISIONS, Plan
from xbm.experiments.training import Training, cosine, shifted

PLAN = Plan(steps=12, warmup=3, capacity=32, classes=3, instances=2, dim=8, shift=1, evaluate_every=5)


@pytest.fixture(scope="module")
def parts(data):
    pictures = load(data)
    return pictures.of(pictures.names[:8]), pictures.of(pictures.names[8:])


def taken(plan, parts, steps=None):
    """Return a training after `steps` steps, by default all."""
    one = Training(plan, *parts)
    one.run(lambda step: step == steps)
    return one


def assert_same(one, other):
    (tensors, values), (others, other_values) = one.state(), other.state()
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert repr(values | {"seconds": 0}) == repr(other_values | {"seconds": 0})  # repr, because NaN != NaN


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("left", [0, 1, 4, 11, 12])
def test_taken_up_again_it_ends_as_if_never_left(parts, precision, left):
    plan = replace(PLAN, precision=precision, learning_rate=0.02)
    whole, before, after = taken(plan, parts), taken(plan, parts, left), Training(plan, *parts)
    if left == 0:
        before = Training(plan, *parts)
    after.load(*before.state())
    assert_same(before, after)
    seen = []
    after.run(seen.append)
    assert seen == [*range(left + 1, 13)]
    assert_same(whole, after)


def test_a_loss_learns_and_goes_on_learning(parts):
    def plan():
        torch.manual_seed(0)
        return replace(PLAN, loss=Proxies())

    whole, before, after = taken(plan(), parts), taken(plan(), parts, 5), Training(plan(), *parts)
    after.load(*before.state())
    after.run()
    assert_same(whole, after)
    (name,) = [name for name in whole.state()[0] if name.startswith("xbm.") and name.endswith("scale")]
    assert whole.state()[0][name] != 1


class Proxies(torch.nn.Module):
    """A loss with a learned parameter."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, S, P, N):
        return (self.scale * S * (N.float() - P.float())).sum(1) + (self.scale - 2) ** 2


def test_measuring_changes_nothing(parts, monkeypatch):
    seldom = taken(replace(PLAN, evaluate_every=100), parts)
    monkeypatch.setattr(training, "READ_EVERY", 1)
    monkeypatch.setattr(Plan, "probe_every", 1)
    often = taken(replace(PLAN, evaluate_every=1), parts)
    assert len(often.curves["recall"]) == 13
    for part in ("encoder", "xbm"):
        for name, value in getattr(seldom.engine, part).state_dict().items():
            assert torch.equal(value, getattr(often.engine, part).state_dict()[name]), name
    assert often.engine.encoder.training


@pytest.mark.parametrize("option", [{"seed": 1}, {"precision": "bfloat16"}, {"shift": 0}, {"network": "resnet"}])
def test_options_reach_the_weights(parts, option):
    ends = [taken(plan, parts).engine.encoder.state_dict() for plan in (PLAN, replace(PLAN, **option))]
    name = "0.weight"
    assert not torch.equal(*(end[name] for end in ends))


def test_the_users_random_numbers_are_left_alone(parts):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    taken(PLAN, parts, 2)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_memory(parts):
    one = taken(replace(PLAN, weight=0.0), parts)
    run, _ = one.outcome(parts[1])
    assert run.name == "in-batch only"
    assert run.memory_megabytes == 0
    assert list(run.figures) == ["batch_loss"]


def test_the_outcome(parts):
    one = taken(PLAN, parts)
    run, found = one.outcome(parts[1], k=(1, 3))
    assert run.name == "memory of 32 rows"
    assert (run.recall_steps, run.figures_steps) == ([0, 5, 10, 12], [10, 12])
    assert run.recall[-1] == run.recall_at_1 == found.recall[1] <= found.recall[3]
    assert run.neighbours.shape == (len(parts[1].labels), 10)
    assert run.seconds > 0
    assert run.memory_megabytes == pytest.approx(32 * (8 * 4 + 24) / 1e6, rel=0.1)


def test_the_slow_drift_is_that_of_the_weights(parts):
    one = Training(replace(PLAN, steps=20), *parts)
    rows = {0: rows_of(one)}
    one.run(lambda step: rows.update({step: rows_of(one)}))
    assert one.curves["probe_steps"] == [10, 20]
    expected = [((rows[step] - rows[step - 10]) ** 2).sum(1).mean().item() for step in (10, 20)]
    np.testing.assert_allclose(one.curves["probe"][10], expected, rtol=1e-5)
    assert np.isnan(one.curves["probe"][100]).all()


def rows_of(one):
    with torch.no_grad():
        rows = one.engine.encoder.eval()(torch.from_numpy(one.pictures.images).float() / 255)
    one.engine.encoder.train()
    return torch.nn.functional.normalize(rows, eps=1e-6)


@pytest.mark.parametrize("network", ["conv", "resnet"])
def test_a_training_that_breaks_down_says_so(parts, network):
    one = Training(replace(PLAN, network=network, learning_rate=1e30, evaluate_every=100), *parts)
    with pytest.raises(DivergenceError, match=r"^the loss is nan at step [234]$"):
        one.run()


def test_embeddings_that_are_not_finite_are_not_measured(parts):
    one = Training(replace(PLAN, learning_rate=1e30, evaluate_every=1), *parts)
    with pytest.raises(DivergenceError, match="embeddings are not finite"):
        one.run()
    assert one.step == 1


def test_weights_that_are_not_finite_are_no_state(parts):
    one = taken(PLAN, parts, 2)
    with torch.no_grad():
        one.engine.encoder[0].weight[0] = torch.inf
    with pytest.raises(DivergenceError, match=r"encoder\.0\.weight is not finite after step 2"):
        one.state()


@pytest.mark.parametrize("steps", [1, 2, 7, 2500])
def test_learning_rates_are_those_of_torch(steps):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert cosine(2e-3, steps) == expected


def test_pictures_are_moved_and_their_edges_fill_the_gap():
    images = np.random.default_rng(0).integers(256, size=(200, 3, 5, 7), dtype=np.uint8)
    found, seen = shifted(images, 2, seed=(3, 4)), set()
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    for picture, around in zip(found, padded, strict=True):
        places = [(y, x) for y in range(5) for x in range(5) if (picture == around[:, y : y + 5, x : x + 7]).all()]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) == 25
    assert (found.shape, found.dtype, found.flags.c_contiguous) == (images.shape, np.uint8, True)


def test_moves_follow_the_seed():
    images = np.random.default_rng(0).integers(256, size=(20, 1, 5, 7), dtype=np.uint8)
    first, again, other = (shifted(images, 2, seed=seed) for seed in ((3, 4), (3, 4), (3, 5)))
    assert (first == again).all()
    assert not (first == other).all()
