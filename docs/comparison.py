"""Print the table of `docs/comparison.md`: what each library does, found by doing it.

`pip install -c constraints.txt ".[torch]" pytorch-metric-learning==2.9.0 lightly==1.6.0`, then
`python docs/comparison.py`. A library that is not installed has no column.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB = 2**20


@dataclass(frozen=True)
class Library:
    """One memory as the questions see it; None where it has no word for something."""

    package: str
    new: Callable  # (capacity, dim, pos_margin) -> an empty memory
    column: Callable  # memory -> the buffer that holds the rows
    rows: Callable  # memory -> the rows that the next call is compared with, beside its own
    call: Callable  # (memory, x, labels) -> the loss, the batch stored
    call_with_ids: Callable | None = None  # the same, labels telling which samples these are
    call_storing_nothing: Callable | None = None  # the same, with a mask that keeps every row out
    labels: Callable | None = None  # memory -> the labels of its rows
    clear: Callable | None = None


def _xbm(capacity=8, dim=2, pos_margin=1.0):
    from xbm import Contrastive
    from xbm.integrations.torch import XBM

    return XBM(dim, capacity, Contrastive(pos_margin), warmup=0, in_batch=False)


def _pytorch_metric_learning(capacity=8, dim=2, pos_margin=1.0):
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory

    loss = ContrastiveLoss(pos_margin=pos_margin, neg_margin=0.5, distance=CosineSimilarity())
    return CrossBatchMemory(loss, dim, memory_size=capacity)


def _lightly(capacity=8, dim=2, pos_margin=None):
    from lightly.loss import NTXentLoss

    return NTXentLoss(memory_bank_size=(capacity, dim))


def _none(labels):
    return torch.zeros(len(labels), dtype=torch.bool)


XBM = Library(
    "xbm",
    _xbm,
    column=lambda memory: memory.embeddings,
    rows=lambda memory: memory.rows().embeddings,
    call=lambda memory, x, labels: memory(x, labels),
    call_with_ids=lambda memory, x, labels: memory(x, labels, ids=labels),
    call_storing_nothing=lambda memory, x, labels: memory(x, labels, enqueue=_none(labels)),
    labels=lambda memory: memory.rows().labels,
    clear=lambda memory: memory.clear(),
)
PYTORCH_METRIC_LEARNING = Library(
    "pytorch-metric-learning",
    _pytorch_metric_learning,
    column=lambda memory: memory.embedding_memory,
    rows=lambda memory: memory.embedding_memory[: None if memory.has_been_filled else memory.queue_idx],
    call=lambda memory, x, labels: memory(x, labels),
    call_with_ids=lambda memory, x, labels: memory(x, labels),
    call_storing_nothing=lambda memory, x, labels: memory(x, labels, enqueue_mask=_none(labels)),
    labels=lambda memory: memory.label_memory,
    clear=lambda memory: memory.reset_queue(),
)
LIGHTLY = Library(
    "lightly",
    _lightly,
    column=lambda memory: memory.memory_bank.bank,
    rows=lambda memory: memory.memory_bank.bank,
    call=lambda memory, x, labels: memory(x, x),  # a batch is compared with itself as its keys
)
LIBRARIES = (XBM, PYTORCH_METRIC_LEARNING, LIGHTLY)


def points(start, stop):
    """Return rows start .. stop - 1 on the unit circle, whose numbers can be read off them."""
    angle = torch.arange(start, stop) / 10
    return torch.stack([angle.cos(), angle.sin()], dim=1).requires_grad_()


def numbers(rows):
    """Return the numbers of such rows in order, as `first-last` where they have no gap."""
    found = sorted(round(10 * math.atan2(y, x)) for x, y in rows.tolist())
    return f"{found[0]} to {found[-1]}" if found == list(range(found[0], found[-1] + 1)) else str(found)


def batches(library, memory, *sizes):
    """Hand a memory batches of these sizes, each row of a class of its own."""
    start = 0
    for size in sizes:
        library.call(memory, points(start, start + size), torch.arange(start, start + size))
        start += size
    return memory


def resume(library):
    """Loss of the next call: uninterrupted, and after `state_dict` and `load_state_dict`."""
    torch.manual_seed(0)
    memory, resumed = batches(library, library.new(), 3, 3, 5), library.new()
    resumed.load_state_dict(memory.state_dict())
    x, labels = points(20, 24), torch.tensor([0, 0, 1, 1])
    losses = [library.call(each, x, labels).item() for each in (memory, resumed)]
    return f"{losses[0]:.3f}, {losses[1]:.3f}"


def evaluation(library):
    """Rows changed by a call in `eval()` under `no_grad()`."""
    memory = batches(library, library.new(), 8).eval()
    before = library.column(memory).clone()
    with torch.no_grad():
        library.call(memory, points(20, 24).detach(), torch.arange(4))
    return str(int((library.column(memory) != before).any(dim=1).sum()))


def crossing_the_end(library):
    """Rows 0 to 8 in batches of 3 through 8 slots: those held."""
    return numbers(library.rows(batches(library, library.new(), 3, 3, 3)))


def larger_than_the_memory(library):
    """Rows 0 to 11 in one batch, 8 slots: those held."""
    return numbers(library.rows(batches(library, library.new(), 12)))


def nothing_stored(library):
    """Rows held after a call on an empty memory whose mask stores nothing."""
    if library.call_storing_nothing is None:
        return "no mask"
    memory = library.new()
    library.call_storing_nothing(memory, points(0, 4), torch.zeros(4, dtype=torch.int64))
    return str(len(library.rows(memory)))


def large_labels(library):
    """Label 16,777,217 in the memory after a call with float labels."""
    if library.labels is None:
        return "no labels"
    memory = library.new()
    library.call(memory, points(0, 1), torch.tensor([2**24 + 1]))
    library.call(memory, points(1, 2), torch.tensor([1.0]))
    return f"{int(library.labels(memory)[0]):,}"


def own_copies(library):
    """Loss of one sample against an empty memory, then against its own older copy; positives' margin 2, 0 = no pair."""
    if library.call_with_ids is None:
        return "no ids"
    memory, x, labels = library.new(pos_margin=2.0), points(0, 1), torch.tensor([0])
    losses = [library.call_with_ids(memory, x, labels).item() for _ in range(2)]
    return f"{losses[0]:.3f}, {losses[1]:.3f}"


def half_precision(library):
    """Dtype of a memory of float32 after a call in bfloat16, and the largest change of a row."""
    memory = batches(library, library.new(), 4)
    before = library.rows(memory)[:4].clone()
    library.call(memory, points(4, 6).bfloat16(), torch.arange(2))
    after = library.rows(memory)[:4]
    return f"{_name(after.dtype)}, {float((after.float() - before).abs().max()):.4f}"


def reset(library):
    """Dtype of a memory of float32 after `.bfloat16()`, and after a reset."""
    if library.clear is None:
        return "no reset"
    memory = library.new().bfloat16()
    before = library.column(memory).dtype
    library.clear(memory)
    return f"{_name(before)}, {_name(library.column(memory).dtype)}"


def graph_breaks(library):
    """Graph breaks of one call under `torch.compile`."""
    torch._dynamo.reset()
    memory = batches(library, library.new(), 4)
    x, labels = points(4, 8), torch.arange(4) // 2
    return str(torch._dynamo.explain(lambda: library.call(memory, x, labels))().graph_break_count)


def kept_for_backward(library):
    """MB kept from forward to backward beside the memory, B = 64, D = 128, M = 8,192 and 32,768."""

    def megabytes(memory, x, labels):
        own, kept = _storage(library.column(memory)), {}

        def pack(tensor):
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = library.call(memory, x, labels)
        loss.backward()
        return sum(size for storage, size in kept.items() if storage != own) / MB

    return ", ".join(f"{megabytes(*_full(library, capacity)):.2f}" for capacity in (8192, 32768))


def largest_array(library):
    """MB of the largest array made in those calls, forward and backward."""

    def megabytes(memory, x, labels):
        with _Largest() as largest:
            library.call(memory, x, labels).backward()
        return largest.bytes / MB

    return ", ".join(f"{megabytes(*_full(library, capacity)):.1f}" for capacity in (8192, 32768))


QUESTIONS = (
    resume,
    evaluation,
    crossing_the_end,
    larger_than_the_memory,
    nothing_stored,
    large_labels,
    own_copies,
    half_precision,
    reset,
    graph_breaks,
    kept_for_backward,
    largest_array,
)


class _Largest(TorchDispatchMode):
    """Notes the largest array that an operation makes anew."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and _storage(each) not in given:
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return made


def _full(library, capacity, batch=64, dim=128):
    """Return a full memory and the batch to come: random directions, four rows a class."""
    torch.manual_seed(0)
    memory = library.new(capacity, dim)
    for _ in range(capacity // batch):
        library.call(memory, torch.randn(batch, dim, requires_grad=True), torch.arange(batch) // 4)
    return memory, torch.randn(batch, dim, requires_grad=True), torch.arange(batch) // 4


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def answer(question, library):
    """Return a question's answer, or the name of the error."""
    try:
        return question(library)
    except (AssertionError, RuntimeError, TypeError) as error:
        return type(error).__name__


def table(libraries):
    """Yield the table's lines."""
    yield "| | " + " | ".join(f"{each.package} {version(each.package)}" for each in libraries) + " |"
    yield "|---" * (1 + len(libraries)) + "|"
    for question in QUESTIONS:
        yield f"| {question.__doc__.rstrip('.')} | " + " | ".join(answer(question, each) for each in libraries) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    installed = [each for each in LIBRARIES if find_spec(each.package.replace("-", "_"))]
    print(*table(installed), sep="\n")
