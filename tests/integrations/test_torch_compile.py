"""torch.compile: the whole call in one graph, equal results, and no more graphs than batch sizes require."""

import array_api_compat.torch
import pytest
import torch
from hypothesis import given
from torch._dynamo.testing import CompileCounterWithBackend

from tests.integrations.test_torch import numbers
from tests.strategies import histories
from xbm import REPORT, Block, Objective
from xbm.integrations.torch import XBM
from xbm.losses import LOSSES
from xbm.memory_state import MemoryState

OPTIONS = [
    {},
    {"loss": "multi-similarity", "miner": "multi-similarity"},
    {"reduction": "sum", "weight": 0.3, "copies": "keep"},
    {"in_batch": False, "normalize": False},
    {"dtype": torch.bfloat16},
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batches(sizes, dim=4, seed=0):
    """Yield batches of the given sizes, with repeated samples."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        ids = torch.randint(30, (size,), generator=generator)
        yield torch.randn(size, dim, generator=generator), ids % 3, ids


def assert_same(eager, compiled, call, history, **tolerance):
    """Assert that two modules give the same losses, gradients, reports and memories at every call."""
    for x, labels, ids in history:
        found = []
        for one in (eager, call):
            leaf = x.clone().requires_grad_()
            loss = one(leaf, labels, ids=ids)
            loss.backward()
            found.append((loss.detach(), leaf.grad))
        (loss, gradient), (same_loss, same_gradient) = found
        torch.testing.assert_close(same_loss, loss, **tolerance)
        torch.testing.assert_close(same_gradient, gradient, **tolerance)
        rounded = 2.0 if tolerance else 0.0  # weights close to 0 may count as pairs or not
        for figure, mine, theirs in zip(REPORT, compiled.figures, eager.figures, strict=True):
            allowed = {"atol": rounded, "rtol": 0.0} if figure == "pairs" else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(mine, theirs, equal_nan=True, **allowed)
        for name in MemoryState._fields:
            torch.testing.assert_close(getattr(compiled, name), getattr(eager, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_is_eager_in_three_graphs(options):
    """One graph each for the first size, any other size, and 1; the state of the memory needs no more."""
    eager, compiled = (XBM(4, 20, **{"warmup": 2} | options) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, backend=counter, fullgraph=True)
    assert_same(eager, compiled, call, batches([8, 6, 7, 8, 1, 5, 1, 30, 8]))
    assert counter.frame_count == 3


def test_memories_of_other_capacities_compile_too():
    """From the second capacity on, the compiler treats it as symbolic."""
    objective = Objective(warmup=0)
    step = torch.compile(objective.step, backend="eager", fullgraph=True)
    for capacity in (8, 12):
        states = [objective.init(capacity=capacity, dim=4, xp=array_api_compat.torch) for _ in range(2)]
        for x, labels, ids in batches([6, 6]):
            found = [one(state, x, labels, ids=ids) for one, state in zip((step, objective.step), states, strict=True)]
            torch.testing.assert_close(found[0].loss, found[1].loss)
            states = [one.state for one in found]


def test_any_history_compiled_is_eager():
    """A module that is compiled once and runs several histories from an empty memory."""
    eager, compiled = (XBM(3, 7, warmup=1) for _ in range(2))
    empty = compiled.state_dict()
    empty = {name: value.clone() for name, value in empty.items()}
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)

    @given(history=histories(dim=3, with_ids=True))
    def holds(history):
        for one in (eager, compiled):
            one.load_state_dict(empty)
        assert_same(eager, compiled, call, (tuple(map(torch.tensor, batch[:3])) for batch in history))

    holds()


def test_masks_keys_and_evaluation_are_compiled_too():
    eager, compiled = (XBM(4, 20, warmup=1) for _ in range(2))
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for x, labels, ids in batches([6, 6, 6]):
        for options in ({"enqueue": labels > 0}, {"keys": x.flip(0), "key_labels": labels.flip(0)}, {"ids": ids}):
            torch.testing.assert_close(call(x, labels, **options), eager(x, labels, **options))
    eager.eval(), compiled.eval()
    before = {name: getattr(compiled, name).clone() for name in MemoryState._fields}
    with torch.no_grad():
        torch.testing.assert_close(call(x, labels), eager(x, labels))
    assert all(torch.equal(getattr(compiled, name), value) for name, value in before.items())


def test_encoder_and_memory_in_one_graph():
    encoder, module = torch.nn.Linear(6, 4), XBM(4, 20, warmup=1)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda x, labels: module(encoder(x), labels), backend=counter, fullgraph=True)
    for x, labels, _ in numbers(0, 3, dim=6):
        call(x, labels).backward()
    assert counter.frame_count == 1
    assert int(module.count) == 18
    assert encoder.weight.grad is not None


def test_a_large_memory_is_walked_in_sixteen_blocks_at_most():
    """A compiler unrolls the walk; the number of blocks is bounded for any capacity."""
    module, products = XBM(4, 2**15, warmup=0), []

    def count(graph, _):
        products.append(sum("matmul" in str(node.target) for node in graph.graph.nodes))
        return graph

    x, labels, _ = next(numbers(0, 1))
    torch.compile(module, backend=count, fullgraph=True)(x, labels)
    assert products[0] <= 16 * 3 + 6  # similarities and two weight products per block, and the in-batch products


NAMES = list({type(make()): name for name, make in LOSSES.items()}.values())
FORMS = ["contrastive", "supcon", "batch-hard-triplet", "smooth-ap"]  # sided, of sums, of hardest pairs, whole rows


@pytest.mark.parametrize("loss", sorted({*NAMES} - {*FORMS}))
def test_every_loss_is_compiled_in_a_step(loss):
    eager, compiled = (XBM(4, 300, loss, warmup=1) for _ in range(2))
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    assert_same(eager, compiled, call, batches([6, 6, 6]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", FORMS)
def test_inductor_agrees(loss):
    """On a whole step, of one loss of each form; of the others, on what is theirs alone."""
    eager, compiled = (XBM(4, 300, loss, warmup=1) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True)
    assert_same(eager, compiled, call, batches([6, 6, 6]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", sorted({*NAMES} - {*FORMS}))
def test_inductor_agrees_on_every_loss(loss):
    """On a block of the memory, whose rows of pairs are all of a step that a loss has a hand in."""
    generator = torch.Generator().manual_seed(0)
    S = 2 * torch.rand((6, 300), generator=generator) - 1
    kind = torch.randint(3, S.shape, generator=generator)
    block = Block(S, (kind == 0) * 1.0, (kind == 1) * 1.0, torch.arange(300), torch.arange(6))
    whole = LOSSES[loss]().whole
    for one, other in zip(torch.compile(whole, fullgraph=True)(block), whole(block), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compiled_too(dtype):
    eager, compiled = (XBM(4, 20, warmup=1, dtype=dtype) for _ in range(2))
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        history = [(x.to(dtype), labels, ids) for x, labels, ids in batches([6, 6, 5])]
        assert_same(eager, compiled, call, history)


def test_a_function_as_a_loss_says_that_it_is_eager():
    module = XBM(4, 20, lambda S, positive, negative: (S * negative).sum(dim=1), warmup=0)
    x, labels, _ = next(numbers(0, 1))
    with pytest.raises(Exception, match="does not support a function as a loss"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x, labels)
