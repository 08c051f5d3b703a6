"""Compensation in PyTorch: rounds equal the core's, have no side effects, resume exactly, and agree on all ranks."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.processes import shared
from xbm import Compensation, Objective, compensation
from xbm.integrations.torch import XBM
from xbm.integrations.torch.compensation import unchanged_statistics
from xbm.state import from_named, named

DIM, CAPACITY, SAMPLES = 4, 32, 40
ROUNDS = {"probes": 16, "every": 3}
PICTURES = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))


def network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, DIM))


def made(encoder, options=ROUNDS, **more):
    compensate = Compensation(**options)

    def embed(ids):
        assert not torch.is_grad_enabled()
        return encoder(PICTURES[ids])

    return XBM(DIM, CAPACITY, warmup=2, compensate=compensate, embed=embed if compensate.probes else None, **more)


def motion_of(module):
    return {name: module.get_buffer(f"motion_{name}") for name in compensation.Motion._fields}


def train(encoder, module, optimizer, steps, seed=0):
    """Take steps; return their losses."""
    losses = []
    for step in steps:
        ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed + step))[:12]
        loss = module(encoder(PICTURES[ids]), ids // 2, ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers() if name not in ("marker", "figures")}


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_a_round_is_the_cores_and_touches_nothing_else():
    encoder = network()
    module = made(encoder)
    train(encoder, module, torch.optim.SGD(encoder.parameters(), lr=0.1), range(3))
    before = from_named(buffers(module))
    statistics, generator = buffers(encoder), torch.random.get_rng_state()

    slots, filled, known = module.objective.compensate.probe(before.memory)
    assert torch.equal(known, before.memory.ids[slots])
    with torch.no_grad():
        fresh = copy.deepcopy(encoder)(PICTURES[known])
    memory, motion = module.objective.compensate.move(before.memory, before.motion, slots, fresh, filled)
    before = before._replace(memory=memory, motion=motion)

    ids = torch.arange(12)
    z = encoder(PICTURES[ids])
    statistics_after = buffers(encoder)
    module(z, ids % 5, ids=ids).backward()  # the tensors saved for backward are unchanged
    assert encoder[0].weight.grad.abs().sum() > 0
    same(buffers(encoder), statistics_after)
    assert not torch.equal(statistics["1.running_mean"], statistics_after["1.running_mean"])  # from the batch alone
    assert torch.equal(torch.random.get_rng_state(), generator)

    expected = module.objective.step(before, z.detach(), ids % 5, ids=ids).state
    same(buffers(module), named(expected))
    assert module.report["drift_after"] == float(expected.motion.after) < module.report["drift_before"]


def test_statistics_come_back_also_from_an_error():
    encoder = network()
    before = buffers(encoder)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), unchanged_statistics():
        encoder(encoder(PICTURES))
    same(buffers(encoder), before)
    with unchanged_statistics(), torch.no_grad():
        found = encoder(PICTURES)
    assert torch.equal(found, copy.deepcopy(encoder)(PICTURES))  # batch norm still uses batch statistics
    same(buffers(encoder), before)


@pytest.mark.parametrize("options", [ROUNDS, {}, {"returning": True}], ids=["rounds", "follow", "returning"])
def test_resume_is_exact(options):
    def started():
        encoder = network()
        return encoder, made(encoder, options), torch.optim.Adam(encoder.parameters(), lr=0.05)

    parts = started()
    train(*parts, range(5))
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    wanted = train(*parts, range(5, 12))
    resumed = started()
    train(*resumed, range(2))  # a separate run, whose memory is replaced on load
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    assert train(*resumed, range(5, 12)) == wanted
    same(buffers(resumed[1]), buffers(parts[1]))
    assert float(parts[1].motion_trust) != 0


def test_saved_with_and_loaded_without_and_the_other_way_round():
    encoder = network()
    moving, still = made(encoder), XBM(DIM, CAPACITY, warmup=2)
    train(encoder, moving, torch.optim.SGD(encoder.parameters(), lr=0.1), range(7))
    still.load_state_dict(moving.state_dict())
    assert torch.equal(still.embeddings, moving.embeddings)
    moving.load_state_dict(still.state_dict())
    same(motion_of(moving), compensation.still(moving._state().memory)._asdict())


def test_a_copy_and_a_cleared_memory_are_still():
    encoder = network()
    module = made(encoder)
    train(encoder, module, torch.optim.SGD(encoder.parameters(), lr=0.1), range(7))
    twin = copy.deepcopy(module)
    assert twin._embed is module._embed
    assert twin.motion_shift.is_meta  # no storage is allocated before compensation starts
    assert len(twin.rows().labels) == 0
    module.clear()
    for one in (twin, module):
        assert float(one.motion_trust) == 0
        assert one.motion_before.isnan()


def test_a_motion_goes_where_its_memory_goes():
    encoder = network()
    module = made(encoder)
    train(encoder, module, torch.optim.SGD(encoder.parameters(), lr=0.1), range(7))
    saved, twin = module.state_dict(), copy.deepcopy(copy.deepcopy(module))
    assert not any(name.startswith("motion_") for name in twin.state_dict())  # not saved before compensation starts
    wider = XBM(DIM, 2 * CAPACITY, compensate=Compensation())
    for one, options in ((made(network()), {"assign": True}), (wider, {}), (twin, {})):
        one.load_state_dict(copy.deepcopy(saved), **options)
        same(motion_of(one), motion_of(module))
        assert torch.equal(one.rows().embeddings, module.rows().embeddings)
    with pytest.raises(RuntimeError, match="7 dimensions"):
        module.load_state_dict(XBM(7, CAPACITY, compensate=Compensation()).state_dict())
    same(motion_of(module), motion_of(twin))
    with torch.device("meta"):
        empty = XBM(DIM, CAPACITY, compensate=Compensation())
    same(motion_of(empty.to_empty(device="cpu")), compensation.still(empty._state().memory)._asdict())


def test_a_bad_motion_is_refused_and_half_a_one_is_none():
    encoder = network()
    module = made(encoder)
    train(encoder, module, torch.optim.SGD(encoder.parameters(), lr=0.1), range(7))
    saved, before = copy.deepcopy(module.state_dict()), buffers(module)
    for name, value, sentence in (
        ("shift", saved["motion_shift"].to("meta"), "motion_shift must be a dense tensor with values, got Tensor"),
        ("shift", saved["motion_shift"].to_sparse(), "motion_shift must be a dense tensor"),
        ("trust", saved["motion_trust"].numpy(), "motion_trust must be a dense tensor with values, got ndarray"),
        ("shift", torch.zeros(DIM + 1), r"motion_shift must have shape \(4,\), got \(5,\)"),
        ("trust", torch.tensor(torch.nan), "motion_trust is not finite"),
    ):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=f"The memory is unchanged.* {sentence}"):
                module.load_state_dict(saved | {f"motion_{name}": value}, assign=assign)
            same(buffers(module), before)
    del saved["motion_trust"]
    with torch.inference_mode():
        module.load_state_dict(saved, assign=True)
    same(motion_of(module), compensation.still(module._state().memory)._asdict())
    train(encoder, module, torch.optim.SGD(encoder.parameters(), lr=0.1), range(7, 10))


def test_an_objective_that_is_replaced_stops_the_motion_and_cannot_start_it():
    encoder = network()
    module, plain = made(encoder, {}), XBM(DIM, CAPACITY, warmup=2)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    train(encoder, module, optimizer, range(5))
    moving, module.objective = module.objective, plain.objective
    assert not any(name.startswith("motion_") for name in buffers(module))
    twin = XBM(DIM, CAPACITY, warmup=2)
    twin.load_state_dict(module.state_dict())
    for step in range(2):
        x, ids = torch.randn(12, DIM, generator=torch.Generator().manual_seed(step)), torch.arange(12)
        assert torch.equal(module(x, ids // 2, ids=ids), twin(x, ids // 2, ids=ids))
    assert torch.equal(module.eval()(x, ids // 2), twin.eval()(x, ids // 2))
    same(buffers(module), buffers(twin))
    for one, objective, missing in (
        (plain, moving, "motion_shift"),
        (module, moving, "motion_shift"),
        (plain, Objective(settle=1.0), "warmup_drift, warmup_counted"),
    ):
        kept, before = one.objective, buffers(one)
        sentence = f"no buffers {missing}.*: make a new XBM, with settle= or compensate= from the start"
        with pytest.raises(ValueError, match=sentence):
            one.objective = objective
        assert one.objective is kept
        same(buffers(one), before)
    following = XBM(DIM, CAPACITY, compensate=Compensation())
    following.objective = made(encoder).objective
    with pytest.raises(ValueError, match=r"make it with embed=, or compensate with probes=0"):
        following(encoder(PICTURES), torch.arange(SAMPLES), ids=torch.arange(SAMPLES))
    assert following.step == 0


def test_rounds_are_those_of_the_objective_that_is_there():
    encoder, embedded = network(), []
    module = made(encoder, {"probes": 16, "every": 1})
    module._embed = (lambda ids: embedded.append(int(module.step)) or encoder(PICTURES[ids]),)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    train(encoder, module, optimizer, range(3))
    module.objective = replace(module.objective, compensate=Compensation(probes=16, every=3))
    train(encoder, module, optimizer, range(3, 10))
    assert embedded == [1, 2, 3, 6, 9]


def test_evaluation_moves_nothing():
    encoder = network()
    module = made(encoder, {"probes": 16, "every": 1})
    train(encoder, module, torch.optim.SGD(encoder.parameters(), lr=0.1), range(4))
    before = buffers(module)
    module.eval()(encoder(PICTURES[:12]), torch.arange(12) % 5, ids=torch.arange(12))
    same(buffers(module), before)


def refuses(error, sentence, module, call):
    """Assert that a call raises an error, and that a step with a valid embed then works."""
    before = buffers(module)
    with pytest.raises(error, match=sentence):
        call()
    same(buffers(module), before)


def test_bad_embeddings_are_refused_and_nothing_is_lost():
    encoder, ids = network(), torch.arange(12)
    for embed, error, sentence in (
        (lambda ids: encoder(PICTURES[ids])[1:], ValueError, "a row for each of the 12 ids, got 11"),
        (lambda ids: PICTURES[ids], ValueError, r"the result of embed must have shape \(B, 4\), .* got \(12, 6\)"),
        (lambda ids: None, TypeError, "the result of embed must be an array of torch, got NoneType"),
        (lambda ids: torch.zeros(len(ids), DIM, dtype=torch.int64), TypeError, "the result of embed must be float32"),
    ):
        module = XBM(DIM, CAPACITY, compensate=Compensation(probes=16, every=1), embed=embed)
        module(encoder(PICTURES[ids]), ids % 5, ids=ids)
        refuses(error, sentence, module, partial(module, encoder(PICTURES[ids]), ids % 5, ids=ids))
    module = made(encoder, {"probes": 16, "every": 1})
    module(encoder(PICTURES[ids]), ids % 5)
    refuses(
        ValueError,
        "the memory rows have none: pass the ids of each batch",
        module,
        partial(module, PICTURES[:, :4], ids),
    )


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"compensate": Compensation(probes=16)}, ValueError, "pass both or neither"),
        ({"compensate": Compensation(), "embed": len}, ValueError, "pass both or neither"),
        ({"embed": len}, ValueError, "pass both or neither"),
        (
            {"compensate": Compensation(probes=16), "embed": 3},
            TypeError,
            r"embed must be callable as embed\(ids\), got 3",
        ),
        ({"compensate": "follow"}, TypeError, "compensate must be an xbm.Compensation, got 'follow'"),
    ],
)
def test_options_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        XBM(DIM, CAPACITY, **options)


def moved(history, options, mode):
    """Take steps on this rank, with one row per sample, so that shards find the same old rows."""
    encoder = nn.Linear(6, DIM).double()  # no batch norm, whose statistics would differ on a part of the rows
    torch.nn.init.eye_(encoder.weight)
    torch.nn.init.zeros_(encoder.bias)
    many = dist.is_initialized()
    embed = (lambda ids: encoder(PICTURES[ids].double())) if options.get("probes") else None
    shard = {"shard": True} if mode == "sharded" else {}
    module = XBM(
        DIM,
        CAPACITY,
        warmup=1,
        dtype=torch.float64,
        copies="replace",
        compensate=Compensation(**options),
        embed=embed,
        **shard,
    )
    for step, ids in enumerate(history):
        own = torch.tensor(ids[dist.get_rank()] if many else [one for part in ids for one in part])
        with torch.no_grad():
            encoder.weight += 0.05 * torch.sin(torch.arange(6 * DIM).reshape(DIM, 6) + step)
            encoder.bias += 0.05
        module(encoder(PICTURES[own].double()), own, ids=own)
    return {name: value.numpy() for name, value in buffers(module).items()}


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
@pytest.mark.parametrize(
    "options",
    [{"follow": False, "probes": 17, "every": 1}, {}, {"returning": True}],
    ids=["rounds", "follow", "returning"],
)
def test_ranks_are_one_process(mode, options):
    """One fit uses the pairs of all ranks. A shard selects its own rows, so the pairs differ from those of one process.

    The first round finds no rows in the second shard. The ranks share 17 rows.
    """
    rng, two = np.random.default_rng(1), shared(2)
    history = [[rng.choice(SAMPLES, n, replace=False).tolist() for n in (9, 7)] for _ in range(8)]
    own_pairs = mode == "sharded" and "probes" in options
    many, one = two.run(moved, history, options, mode), moved(history, options, mode="replicated")
    for name, value in one.items():
        held = [state[name] for state in many]
        if mode == "sharded" and name in ("embeddings", "labels", "ids", "stored_at"):
            held = [np.concatenate(held)]
        for mine in held:
            np.testing.assert_array_equal(mine, held[0], err_msg=name)
            if own_pairs and (name == "embeddings" or name.startswith("motion_")):
                assert name == "motion_rejected" or np.max(np.abs(mine - value)) < 0.2  # up to 0.25 for other histories
                assert name != "embeddings" or np.mean(np.abs(mine - value)) < 0.02
            else:
                np.testing.assert_allclose(mine, value, rtol=1e-6, atol=1e-9, err_msg=name)


def wider_than_the_memory():
    """Take two steps with an encoder in float64; before the second, this rank's shard may or may not have rows."""
    encoder = network().double()
    embed = lambda ids: encoder(PICTURES[ids].double())  # noqa: E731
    module = XBM(DIM, CAPACITY, warmup=1, shard=True, compensate=Compensation(probes=16, every=1), embed=embed)
    ids = torch.arange(8) + 8 * dist.get_rank()
    for _ in range(2):
        module(embed(ids), ids // 2, ids=ids)
        with torch.no_grad():
            encoder[-1].bias += 0.1
    return {name: value.numpy() for name, value in motion_of(module).items()}


def test_ranks_agree_where_one_has_no_row_to_embed():
    """The dtype of a rank's pairs must not depend on whether it has any."""
    first, second = shared(2).run(wider_than_the_memory)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    assert np.isfinite(first["before"])


def fails_on_one(rank):
    """Raise an error in one rank's embed; then take a step with a valid embed."""
    encoder = nn.Linear(6, DIM)
    fail = [True]

    def embed(ids):
        if fail[0] and dist.get_rank() == rank:
            raise ZeroDivisionError("no picture")
        return encoder(PICTURES[ids])

    module = XBM(DIM, CAPACITY, compensate=Compensation(probes=16, every=1), embed=embed)
    ids = torch.arange(12) + 12 * dist.get_rank()
    module(encoder(PICTURES[ids]), ids % 5, ids=ids)
    before = buffers(module)
    said = ""
    try:
        module(encoder(PICTURES[ids]), ids % 5, ids=ids)
    except (RuntimeError, ZeroDivisionError) as error:
        said = str(error)
    same(buffers(module), before)
    fail[0] = False
    module(encoder(PICTURES[ids]), ids % 5, ids=ids)
    return said, int(module.step)


def test_a_rank_that_cannot_embed_tells_the_others():
    (told, step), (own, _) = shared(2).run(fails_on_one, 1)
    assert step == 2
    assert "rank 1 could not embed its rows again, so no memory was moved" in told
    assert own == "no picture"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_encoders_and_modules():
    encoder = network()
    module = made(encoder)
    compiled = torch.compile(encoder, backend="eager")
    module._embed = (lambda ids: compiled(PICTURES[ids]),)
    before = buffers(encoder)
    train(encoder, module, torch.optim.SGD(encoder.parameters(), lr=0.0), range(4))
    assert int(encoder[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 4

    eager, fused = made(None, {}), made(None, {})
    step = torch.compile(fused, backend="eager", fullgraph=True)
    for i in range(4):
        x = torch.randn(12, DIM, generator=torch.Generator().manual_seed(i)) + i
        assert torch.equal(step(x, torch.arange(12) % 5), eager(x, torch.arange(12) % 5))
    same(buffers(fused), buffers(eager))
    assert float(eager.motion_trust) != 0
