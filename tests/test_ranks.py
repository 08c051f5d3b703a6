"""Several ranks give the results of one process with the concatenated batch, with replicated and sharded memories."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xbm
from tests.pair_losses import MINED, HardestNegatives, SoftTriplets
from tests.ranks import Threads, ThreadSpread, together
from tests.strategies import named
from tests.table import BACKENDS
from tests.test_compensation import rotation
from xbm.compensation import Probes
from xbm.memory import of_shard
from xbm.memory_state import MemoryState
from xbm.ranks import Ranks, Shard

DIM = 16
COMPILES = any(row.compiles for row in BACKENDS)
SIZES = [0, 4] if COMPILES else [0, 3, 5]
FEW = 1 if COMPILES else min(5, settings.default.max_examples // 10)  # of draws, of several calls on several ranks
OPTIONS = [
    {},
    {"loss": xbm.Contrastive(reduction="mean-nonzero"), "copies": "keep"},
    {"loss": "multi-similarity", "miner": "multi-similarity"},
    {"loss": HardestNegatives(), "copies": "replace"},
    {"loss": "margin", "miner": "margin"},
    {"loss": MINED[4], "copies": "replace", "weight": 0.3},
    {"loss": "smooth-ap", "in_batch": False},
    {"match": lambda a, b: abs(a[:, None] - b[None, :]) <= 1, "in_batch": False, "ignore_label": 0},
]
WHOLE_ROWS = [
    {"loss": "triplet"},
    {"loss": SoftTriplets(), "copies": "replace"},
    {"loss": "triplet", "miner": "margin"},
]
CASES = [(False, one) for one in OPTIONS + WHOLE_ROWS] + [(True, one) for one in OPTIONS]


def named_case(case):
    return named(case) if isinstance(case, dict) else ("sharded" if case else "replicated")


def parts(rng, ranks, *, labels=True, ids=True, keys=False):
    """Return a call's input for each rank."""
    found = []
    for _ in range(ranks):
        n, one = int(rng.choice(SIZES)), {}
        one["x"] = rng.normal(size=(n, DIM))
        if labels:
            one["labels"] = rng.integers(3, size=n)
        if ids:
            one["ids"] = rng.integers(-1, 9, size=n)
        if keys:
            one["keys"] = rng.normal(size=(n, DIM))
        one["enqueue"] = rng.random(n) < 0.8
        found.append(one)
    return found


def concatenated(calls):
    """Return the input of a single process."""
    return {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}


def states(backend, objective, capacity, ranks, *, sharded):
    rows = capacity // ranks if sharded else capacity
    return [objective.init(capacity=rows, dim=DIM, dtype=backend.xp.float64, xp=backend.xp) for _ in range(ranks)]


def whole(backend, found, *, sharded):
    """Return the memory that ranks hold, as NumPy arrays, after comparing what all of them must hold alike."""
    every = [MemoryState(*map(backend.numpy, state.memory)) for state in found]
    alike = MemoryState._fields[4:] if sharded else MemoryState._fields
    for name in alike:
        for one in every:
            np.testing.assert_array_equal(getattr(one, name), getattr(every[0], name), err_msg=name)
    if not sharded:
        return every[0]
    rows = {name: np.concatenate([getattr(one, name) for one in every]) for name in MemoryState._fields[:4]}
    return every[0]._replace(**rows)


@pytest.mark.parametrize(("sharded", "options"), CASES, ids=named_case)
@settings(max_examples=FEW)
@given(
    given_ones=st.sampled_from([{}, {"labels": False}, {"keys": True, "ids": False}]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ranks_are_one_process(backend, sharded, options, given_ones, seed):
    rng, ranks, capacity = np.random.default_rng(seed), 2, 10
    objective = xbm.Objective(warmup=1, block_rows=3, **options)
    one = objective.init(capacity=capacity, dim=DIM, dtype=backend.xp.float64, xp=backend.xp)
    many = states(backend, objective, capacity, ranks, sharded=sharded)
    for _ in range(5):
        calls = parts(rng, ranks, **given_ones)
        arrays = [{name: backend.array(value) for name, value in call.items()} for call in calls]

        def work(rank, meeting, many=many, arrays=arrays):
            with backend.context():
                group = Threads(meeting, rank, ranks, sharded=sharded)
                return objective.step(many[rank], **arrays[rank], group=group)

        results = together(ranks, work)
        expected = objective.step(one, **{name: backend.array(x) for name, x in concatenated(calls).items()})
        one, many = expected.state, [result.state for result in results]
        state, plain = whole(backend, many, sharded=sharded), MemoryState(*map(backend.numpy, one.memory))
        for name in MemoryState._fields:
            close = 1e-12 if name == "embeddings" else 0
            np.testing.assert_allclose(getattr(state, name), getattr(plain, name), atol=close, rtol=0, err_msg=name)
        for result in results:
            np.testing.assert_allclose(backend.numpy(result.loss), backend.numpy(expected.loss), rtol=1e-9)
            for name, figure in expected.report._asdict().items():
                # Of each shard as many old rows are read as of a whole memory: more, unless each sample has only one.
                if not (sharded and name.startswith("drift") and objective.copies != "replace"):
                    found = backend.numpy(getattr(result.report, name))
                    np.testing.assert_allclose(found, backend.numpy(figure), rtol=1e-5, err_msg=name)
        for name in ("gradient", "key_gradient"):
            if getattr(expected, name) is not None:
                gradient = np.concatenate([backend.numpy(getattr(result, name)) for result in results])
                np.testing.assert_allclose(gradient, backend.numpy(getattr(expected, name)), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("sharded", [False, True], ids=named_case)
def test_ranks_move_their_memory_as_one_process_does(backend, sharded):
    """Each id is stored once, so that shards find the same old rows."""
    rng, ranks, capacity = np.random.default_rng(0), 2, 48
    compensate = xbm.Compensation(returning=True, probes=32, every=2, ridge=1.0)
    objective = xbm.Objective(weight=0.0, in_batch=False, copies="replace", compensate=compensate)
    one = states(backend, objective, capacity, 1, sharded=False)[0]
    many = states(backend, objective, capacity, ranks, sharded=sharded)
    samples, turn = rng.normal(size=(60, DIM)), rotation(rng, 0.1, DIM)
    for call in range(5):
        now = samples @ np.linalg.matrix_power(turn, call) + 0.05 * call
        some = rng.permutation(60)[:48]
        arrays = [backend.array(each) for half in (some[:24], some[24:]) for each in (now[half], half)]
        probes = [compensate.probe(state.memory, n=16, shard=Shard(i, ranks)) for i, state in enumerate(many)]
        if sharded:
            places = [backend.numpy(each.slots) + i * capacity // ranks for i, each in enumerate(probes)]
            filled, ids = (np.concatenate([backend.numpy(each[n]) for each in probes]) for n in (1, 2))
            of_all = Probes(*map(backend.array, (np.concatenate(places), filled, ids)))
        else:
            of_all = compensate.probe(one.memory)
            probes = [of_all] * ranks
        fresh = now[backend.numpy(of_all.ids)]
        mine = np.split(fresh, ranks) if sharded else [fresh] * ranks

        def work(rank, meeting, many=many, probes=probes, mine=mine, arrays=arrays, call=call):
            with backend.context():
                state = many[rank]
                if compensate.due(call):
                    each = ThreadSpread(meeting, rank, [1] * ranks)
                    spread = Ranks(each=each, rank=rank, size=ranks, sharded=sharded)
                    state = objective.move(state, probes[rank], backend.array(mine[rank]), ranks=spread)
                x, ids = arrays[2 * rank : 2 * rank + 2]
                group = Threads(meeting, rank, ranks, sharded=sharded)
                return objective.step(state, x, ids, ids=ids, group=group)

        results = together(ranks, work)
        if compensate.due(call):
            one = objective.move(one, of_all, backend.array(fresh))
        ids = backend.array(some)
        one = objective.step(one, backend.array(now[some]), ids, ids=ids).state
        many = [result.state for result in results]
        motion, motions = one.motion, [state.motion for state in many]
        found = whole(backend, many, sharded=sharded)
        np.testing.assert_allclose(found.embeddings, backend.numpy(one.memory.embeddings), atol=1e-9)
        for each in motions:
            for name, value, other in zip(motion._fields, each, motion, strict=True):
                np.testing.assert_allclose(
                    backend.numpy(value), backend.numpy(other), rtol=1e-5, atol=1e-7, err_msg=name
                )
                np.testing.assert_array_equal(backend.numpy(value), backend.numpy(getattr(motions[0], name)))
    assert 0 < float(motion.after) < float(motion.before)
    assert int(motion.rejected) == 0


@given(stored=st.integers(0, 20))
def test_the_rows_of_shards_are_in_the_memorys_order(backend, stored):
    labels = 1 + np.arange(stored)  # 0 is the label of empty slots
    state = xbm.init(capacity=6, dim=1, xp=backend.xp)
    for label in labels:
        row = backend.array(np.ones((1, 1), np.float32)), backend.array(np.asarray([label]))
        state = xbm.enqueue(state, *row)
    slots = backend.numpy(state.labels)
    for index in range(3):
        columns = {name: getattr(state, name)[2 * index : 2 * index + 2, ...] for name in MemoryState._fields[:4]}
        found = xbm.rows(of_shard(state._replace(**columns), Shard(index, 3)))
        mine = [label for label in labels[-6:] if label in slots[2 * index : 2 * index + 2]]
        assert backend.numpy(found.labels).tolist() == mine


def test_a_shard_reads_its_newest_rows_for_the_drift(backend):
    """With rows of one sample in slots 0 to 3 of 8 and cursor 6, the newest row is in slot 3."""
    state = xbm.init(capacity=4, dim=1, dtype=backend.xp.float64, xp=backend.xp)
    for value in range(4):
        row = backend.array(np.asarray([[value]], np.float64)), backend.array(np.asarray([0]))
        state = xbm.advance(xbm.enqueue(state, *row, ids=backend.array(np.asarray([7]))))
    state = state._replace(cursor=backend.array(np.asarray(6)), count=backend.array(np.asarray(8)))
    new = backend.array(np.asarray([[3.0]])), backend.array(np.asarray([7]))
    found = xbm.drift.returning(state, *new, Ranks(size=2, sharded=True))
    assert (float(found.distance), float(found.age)) == (0.0, 1.0)


def test_a_shard_knows_its_slots(backend):
    slots = backend.array(np.asarray([-1, 0, 3, 4, 7, 8]))
    found = [backend.numpy(Shard(index, 2).local(slots, 4)).tolist() for index in range(2)]
    assert found == [[-1, 0, 3, -1, -1, -1], [-1, -1, -1, 0, 3, -1]]
