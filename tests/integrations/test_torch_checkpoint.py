"""Checkpoints on ranks: round trips over any number of ranks, and atomicity."""

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.processes import SECONDS, pool, shared
from xbm.integrations.torch import XBM, checkpoint

DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "bool"]


@pytest.fixture(scope="module")
def pools():
    """Return pools of 2 and 4 ranks, and this process."""
    return {1: Here(), 2: shared(2), 4: shared(4)}


class Here:
    """One process, without a process group."""

    def run(self, function, *arguments):
        return [function(*arguments)]


def made(specs, seed):
    """Return a state of random tensors; some are distributed over the ranks, if there are any."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (shape, dtype, spread) in enumerate(specs):
        drawn = torch.randint(-100, 100, shape, generator=generator).to(getattr(torch, dtype))
        tensors[number] = over_ranks(drawn) if spread and dist.is_initialized() else drawn
    return {"xbm": tensors, "epoch": seed, "schedule": {"groups": [{"rates": [0.1 + 0.2, seed], "weight": None}]}}


def over_ranks(tensor):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def plain(state):
    """Return a state as plain lists and dicts, equal on every rank, for comparison and for pipes."""
    if isinstance(state, dict):
        return {str(key): plain(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return (str(state.dtype), state.tolist()) if isinstance(state, torch.Tensor) else state


def save(folder, specs, seed):
    checkpoint.save(folder, made(specs, seed))


def load(folder, specs):
    state = made(specs, 0)
    checkpoint.load(folder, state)
    return plain(state)


def raised(function, *arguments):
    """Return the raised error as text."""
    try:
        function(*arguments)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


shapes = st.lists(st.integers(0, 9), max_size=2).map(tuple)
specs = st.lists(
    st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()).map(lambda spec: (*spec[:2], spec[2] and spec[0] != ()))
)
orders = st.permutations([1, 2, 4])
SPECS = [((8, 3), "float32", True), ((8,), "int64", True), ((), "int64", False)]


@settings(max_examples=10)
@given(specs=specs, order=orders, seed=st.integers(1, 2**40))
def test_what_one_number_of_ranks_saves_another_loads(pools, specs, order, seed):
    with tempfile.TemporaryDirectory() as folder:
        for size, next_size in itertools.pairwise(order):
            pools[size].run(save, folder, specs, seed)
            for found in pools[next_size].run(load, folder, specs):
                assert found == plain(made(specs, seed))
            seed += 1
        assert sorted(path.name[:6] for path in Path(folder).iterdir()) == ["checkp", "shards"]


def test_strides_views_and_tied_weights(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"turned": whole.T, "view": whole[1:, ::2], "tied": whole, "weight": torch.nn.Parameter(whole)}
    checkpoint.save(tmp_path, state)
    found = {name: torch.zeros_like(value) for name, value in state.items()}
    checkpoint.load(tmp_path, found)
    assert plain(found) == plain(state)


def state_of(rows=None, **changes):
    rows = torch.zeros(4, 2) if rows is None else rows
    return {"xbm": {"rows": rows, "count": torch.tensor(0)}, "epoch": 0} | changes


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a checkpoint of ones."""
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, state_of(torch.ones(4, 2), epoch=1))
    return folder


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (state_of(rows=torch.zeros(4, 3)), r"xbm.rows is \(4, 2\) .* in the checkpoint, \(4, 3\) .* in the state"),
        (state_of(rows=torch.zeros(8, 2)), r"xbm.rows is \(4, 2\) .* in the checkpoint, \(8, 2\) .* in the state"),
        (state_of(rows=torch.zeros(4, 2).half()), "float32 in the checkpoint, .* torch.float16 in the state"),
        (state_of(rows=0), "xbm.rows is .* torch.float32 in the checkpoint, a value in the state"),
        (state_of(xbm={"rows": torch.zeros(4, 2)}), "xbm.count is .* in the checkpoint, missing in the state"),
        (state_of(step=0), "step is missing in the checkpoint, a value in the state"),
        (state_of(epoch=torch.tensor(0)), "epoch is a value in the checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_untouched(folder, state, words):
    before = plain(state)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(folder, state)
    assert plain(state) == before


def test_an_entry_of_it(folder):
    state = {"epoch": 0}
    checkpoint.load(folder, state)
    assert state == {"epoch": 1}


@settings(max_examples=100)
@given(data=st.data())
def test_damage_is_refused_untouched(tmp_path_factory, data):
    """Change one byte or truncate a file, anywhere."""
    folder = tmp_path_factory.mktemp("damaged")
    checkpoint.save(folder, made(SPECS, 7))
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())), "file")
    content = bytearray(path.read_bytes())
    place = int(data.draw(st.floats(0, 1, exclude_max=True), "place") * len(content))
    if data.draw(st.booleans(), "cut"):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255), "bits")
    path.write_bytes(content)
    state = made(SPECS, 0)
    problem = raised(checkpoint.load, folder, state)
    if problem:
        assert "damaged" in problem
    else:
        assert path.suffix == ".json"  # equivalent JSON: other white space or another escape
    assert plain(state) == plain(made(SPECS, 0 if problem else 7))


def test_files_of_other_saves_are_refused(folder):
    (shards,) = folder.glob("shards-*")
    (file,) = shards.iterdir()
    content = file.read_bytes()
    (shards / "another.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"must hold the files \['shard-00001.*, got \['another"):
        checkpoint.load(folder, state_of())
    (shards / "another.safetensors").unlink()
    file.unlink()
    with pytest.raises(ValueError, match=r"must hold the files \['shard-00001.*, got \[\]"):
        checkpoint.load(folder, state_of())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "missing", state_of())
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path, state_of())
    for foreign in ("[]", "{}", '{"content": 1, "crc32": 2}', "\udcff", ""):
        (tmp_path / checkpoint.NAME).write_bytes(foreign.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match="is damaged, or its format is not"):
            checkpoint.load(tmp_path, state_of())
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            checkpoint.load(tmp_path / checkpoint.NAME, state_of())


class Hostile:
    def __reduce__(self):
        return sys.exit, ("code from a checkpoint was run",)


def test_reading_unpickles_nothing(folder, monkeypatch):
    for place in (folder, *folder.glob("shards-*")):
        (place / ".metadata").write_bytes(pickle.dumps(Hostile()))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    state = state_of()
    checkpoint.load(folder, state)
    assert plain(state["xbm"]["rows"]) == plain(torch.ones(4, 2))


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"xbm": {"rows": torch.zeros(2), "name": {1, 2}}}, TypeError),
        ({"groups": [{"rate": torch.zeros(2).numpy()}]}, TypeError),
        ({"rows": torch.zeros(2, device="meta")}, TypeError),
        ({"rows": torch.zeros(2).to_sparse()}, TypeError),
        ({"xbm": {"rows": 1}, "xbm.rows": torch.zeros(2)}, ValueError),
    ],
)
def test_what_cannot_be_saved_is_refused_unwritten(tmp_path, state, problem):
    with pytest.raises(problem, match=r"xbm|groups\.0\.rate must be|rows must be"):
        checkpoint.save(tmp_path / "checkpoint", state)
    assert list(tmp_path.iterdir()) == []


def own():
    """Return a rank's state: some names that all ranks have, and one that only this rank has."""
    rank = dist.get_rank()
    everyones = {"one": torch.tensor(rank), "another": torch.tensor(rank), "value": rank}
    return {"all": everyones, f"rank {rank}": torch.tensor(rank), f"value {rank}": rank}


def save_and_load_own(folder):
    checkpoint.save(folder, own())
    state = own()
    checkpoint.load(folder, state)
    return plain(state)


def test_of_what_all_have_rank_0s_is_kept(pools, tmp_path):
    first, *others = pools[4].run(save_and_load_own, tmp_path)
    for rank, found in enumerate(others, 1):
        assert found["all"] == first["all"] == {"one": ("torch.int64", 0), "another": ("torch.int64", 0), "value": 0}
        assert found[f"rank {rank}"] == ("torch.int64", rank)
        assert found[f"value {rank}"] == rank


def save_another(folder, what):
    """Save with a fault on one rank."""
    odd = dist.get_rank() == 1
    state = state_of(torch.zeros(4 + odd, 2) if what == "shape" else over_ranks(torch.zeros(4, 2)))
    if what == "type" and odd:
        state["epoch"] = {0}
    with pytest.MonkeyPatch.context() as patch:
        if what == "disk" and odd:
            patch.setattr(checkpoint._Planner, "transform_object", full)
        return raised(checkpoint.save, folder, state)


def full(*_):
    raise OSError(28, "No space left on device")


def load_another(folder, what):
    """Load with a difference on one rank; return the error, and whether the state is unchanged."""
    state = state_of(over_ranks(torch.zeros(4, 2)))
    if what == "name" and dist.get_rank() == 1:
        state["rank 1"] = 0
    before = plain(state)
    return raised(checkpoint.load, folder, state), plain(state) == before


def test_what_one_rank_refuses_all_refuse(pools, folder, tmp_path):
    for what, words in {"shape": "xbm.rows must be the same on all ranks", "type": "epoch must be"}.items():
        for problem in pools[2].run(save_another, tmp_path / "new", what):
            assert words in problem
    assert not (tmp_path / "new").exists()
    for problem in pools[2].run(save_another, folder, "disk"):
        assert "was not written: rank 1: OSError: [Errno 28] No space left on device" in problem
    for problem, same in pools[2].run(load_another, folder, "name"):
        assert "rank 1 is missing in the checkpoint" in problem
        assert same
    file = next((folder / json.loads((folder / checkpoint.NAME).read_text())["content"]["shards"]).iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    for problem, same in pools[2].run(load_another, folder, "nothing"):
        assert "is damaged" in problem
        assert same


def killed_at_every_step(folder, pipe):
    """Kill a save at its first, second, ... file operation; send the states that load afterwards."""
    old, new, found = made(SPECS, 1), made(SPECS, 2), {"first": [], "second": []}
    checkpoint.save(folder / "imported", new)
    checkpoint.save(folder / "second", old)
    for name, states in found.items():
        while killed_save(folder / name, new, operations=len(states)):
            state = made(SPECS, 0)
            states.append(raised(checkpoint.load, folder / name, state) or plain(state))
    pipe.send((found, [sorted(path.name[:6] for path in (folder / name).iterdir()) for name in found]))


def killed_save(folder, state, operations):
    """Save in a fork that is killed after some file operations; return whether it was killed."""
    child = os.fork()
    if not child:
        left = iter(range(operations))

        def hook(event, _):
            if event.startswith(("open", "os.")) and event != "os.kill" and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        checkpoint.save(folder, state)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_at_any_operation_it_is_the_one_before_or_this_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=killed_at_every_step, args=(tmp_path, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(SECONDS)
        found, left = ours.recv()
    finally:
        process.kill()
        process.join()
    old, new = plain(made(SPECS, 1)), plain(made(SPECS, 2))
    none = f"FileNotFoundError: there is no checkpoint at {tmp_path / 'first'}: {checkpoint.NAME} not found"
    for before, states in ((none, found["first"]), (old, found["second"])):
        assert len(states) > 8
        turn = states.index(new)
        assert 0 < turn
        assert states == turn * [before] + (len(states) - turn) * [new]
    assert left == 2 * [["checkp", "shards"]]


def remember(folder, first, last):
    """Continue with a memory of 8 rows; return the losses and the memory."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    xbm = XBM(3, 8, warmup=1, shard=size > 1)
    if first:
        state = {"xbm": xbm.state_dict()}
        checkpoint.load(folder, state)
        xbm.load_state_dict(state["xbm"])
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, ids = torch.randn(5, 3, generator=generator), torch.randint(9, (5,), generator=generator)
        part = slice(5 * rank // size, 5 * (rank + 1) // size)
        losses.append(xbm(x[part], ids[part] % 3, ids=ids[part]).item())
    checkpoint.save(folder, {"xbm": xbm.state_dict()})
    return losses, plain(dict(xbm.state_dict()))


@settings(max_examples=5)
@given(order=orders, steps=st.lists(st.integers(1, 3), min_size=3, max_size=3))
def test_a_sharded_memory_goes_on_on_another_number_of_ranks(pools, order, steps):
    bounds = [0, *itertools.accumulate(steps)]
    with tempfile.TemporaryDirectory() as folder:
        expected, memory = remember(Path(folder, "one"), 0, bounds[-1])
        for size, (first, last) in zip(order, itertools.pairwise(bounds), strict=True):
            for losses, found in pools[size].run(remember, Path(folder, "many"), first, last):
                assert losses == pytest.approx(expected[first:last], rel=1e-5)
                assert found == memory or last != bounds[-1]


def train(folder, steps, kill=None):
    """Resume training with a replicated and a sharded memory from the checkpoint; return the losses."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    encoder = torch.nn.Linear(6, 4)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    memories = torch.nn.ModuleList([XBM(4, 12, warmup=1, shard=shard) for shard in (False, True)])

    def state(step):
        adam = get_optimizer_state_dict(encoder, optimizer)
        return {"encoder": encoder.state_dict(), "adam": adam, "memories": memories.state_dict(), "step": step}

    start, losses = 0, []
    if (folder / checkpoint.NAME).exists():
        saved = state(0)
        checkpoint.load(folder, saved)
        encoder.load_state_dict(saved["encoder"])
        set_optimizer_state_dict(encoder, optimizer, saved["adam"])
        memories.load_state_dict(saved["memories"])
        start = saved["step"]
    for step in range(start, steps):
        if kill == (step, "step"):
            die()
        generator = torch.Generator().manual_seed(size * step + rank)
        x, labels = torch.randn(3 + rank, 6, generator=generator), torch.randint(3, (3 + rank,), generator=generator)
        loss = sum(memory(encoder(x), labels) for memory in memories)
        optimizer.zero_grad()
        loss.backward()
        for parameter in encoder.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
        optimizer.step()
        losses.append(loss.item())
        if kill == (step, "rank 1 writes") and rank == 1:
            checkpoint._Planner.transform_object = die
        if kill == (step, "rank 0 replaces"):
            os.replace = die
        checkpoint.save(folder, state(step + 1))
    return start, losses


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@settings(max_examples=3)
@given(kill=st.tuples(st.integers(1, 4), st.sampled_from(["step", "rank 1 writes", "rank 0 replaces"])))
def test_a_run_that_was_killed_has_the_losses_of_one_that_was_not(pools, kill):
    with tempfile.TemporaryDirectory() as folder:
        whole = pools[2].run(train, Path(folder, "whole"), 6)
        with pool(2) as ranks, pytest.raises(EOFError):
            ranks.run(train, Path(folder, "killed"), 6, kill)
        resumed = pools[2].run(train, Path(folder, "killed"), 6)
    for (_, losses), (start, others) in zip(whole, resumed, strict=True):
        assert start == kill[0]
        assert others == losses[start:]
