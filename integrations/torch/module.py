"""The PyTorch module: the core's step over a state in buffers, with its gradient attached to autograd."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import torch
import torch.distributed as dist

from xbm.backends.torch import is_compiling
from xbm.batch import Group
from xbm.compensation import Rounds
from xbm.integrations.pytorch_metric_learning import adapted
from xbm.integrations.torch import agreement, filling
from xbm.integrations.torch.compensation import Embed, moved
from xbm.integrations.torch.memory import Memory
from xbm.integrations.torch.report import Report
from xbm.losses import Differentiated, LossLike
from xbm.objective import Objective, Options, objective_of
from xbm.options import accepts
from xbm.report import REPORT
from xbm.state import State


@accepts(Objective)
class XBM(Memory):
    """In-batch loss plus memory loss; in training mode every call also stores its batch.

    L = (1/B) sum_i (L_i^batch + weight L_i^memory). Keep it beside the encoder, not inside it: an exported encoder then
    holds no memory. Saved and loaded with `state_dict`, training resumes exactly. A deep copy, such as the start of an
    average of weights, has the options and an empty memory.

    Once `torch.distributed` is initialised, a call in training mode is a call on all ranks. All batches go into one
    memory, in rank order. The loss is that of the concatenated batch; the gradient of a rank's embeddings is multiplied
    by the number of ranks, since DDP and FSDP average gradients. Keep the module outside of DDP, or on DDP's list of
    buffers to ignore.

    Parameters
    ----------
    dim : int
        D, the embeddings' size.
    capacity : int
        M, the most rows the memory holds; about M x (4 D + 24) bytes in float32.
    loss : str, PairLoss, callable or pytorch-metric-learning loss
        Pair loss of both terms: a name among `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), a loss, or
        a function `(S, positive, negative) -> (B,)`, see `xbm.losses.Differentiated`. If it is an `nn.Module`, it
        becomes a submodule: its learned parameters are among `xbm.parameters()`. The same holds for the options `miner`
        (which can also be a pytorch-metric-learning miner), `match` and `pair_weights`.
    objective : Objective, optional
        The loss and all options in one object, in place of `loss` and the options below.
    dtype : torch.dtype
        Dtype of the stored rows: float32, bfloat16, float16 or float64. `.half()` and `.to(dtype)` leave it unchanged.
    embed : callable, optional
        A function of ids (n,), a tensor on the CPU, that returns the embeddings (n, D) of these samples, as in
        `lambda ids: encoder(images[ids])`: for `Compensation(probes=...)`. It is called without gradients. Batch norm
        runs as in training, but its running statistics stay unchanged.
    device : torch.device, optional
        Device of the memory; `.to(device)` moves it.
    shard : bool
        Whether each rank of the process group holds capacity / ranks of the rows, or all of them. Losses that need
        whole rows cannot be sharded.
    group : ProcessGroup, optional
        The ranks that train together; all ranks if left out. In training mode, a call on one is a call on all of them.
    {options}

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, saying what is accepted.

    Examples
    --------
    >>> import torch
    >>> from xbm.integrations.torch import XBM
    >>> encoder = torch.nn.Linear(20, 8)
    >>> xbm = XBM(dim=8, capacity=256, warmup=2)
    >>> for _ in range(4):
    ...     images, labels = torch.randn(16, 20), torch.randint(5, (16,))
    ...     loss = xbm(encoder(images), labels)
    ...     loss.backward()
    >>> xbm.report["fill"]
    0.25

    References
    ----------
    Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv 1912.06798.
    """

    figures: torch.Tensor
    marker: torch.Tensor

    def __init__(
        self,
        dim: int,
        capacity: int,
        loss: LossLike | None = None,
        *,
        objective: Objective | None = None,
        dtype: torch.dtype = torch.float32,
        embed: Embed | None = None,
        device: torch.types.Device = None,
        shard: bool = False,
        group: dist.ProcessGroup | None = None,
        **options: Unpack[Options],
    ) -> None:
        given: dict[str, Any] = {"loss": loss, **options}  # a loss or a miner of another library as it came
        pair_loss, options["miner"] = adapted(loss, options.get("miner"), dim=dim)
        if options["miner"] is None:
            del options["miner"]
        made = objective_of(objective, pair_loss, options)
        if objective is not None:
            given = made.values()
        if embed is not None and not callable(embed):
            raise TypeError(f"embed must be callable as embed(ids), got {embed!r:.80}")
        rounds = _rounds_of(made)
        if (embed is None) != (rounds is None):
            raise ValueError("embed(ids) is for Compensation(probes=...), whose rows it embeds: pass both or neither")
        super().__init__(made, dim, capacity, dtype=dtype, device=device, shard=shard, group=group)
        self._rounds = rounds
        # In a tuple, so that a module does not become a submodule: its weights belong to the encoder.
        self._embed = (embed,)
        for name, value in given.items():
            function = value.function if isinstance(value, Differentiated) else value
            if isinstance(function, torch.nn.Module):
                self.add_module(name, function)
        figures = torch.full((len(REPORT),), torch.nan, dtype=torch.float32, device=device)
        self.register_buffer("figures", figures, persistent=False)
        # Per-process marker: detects DDP broadcasting our buffers.
        self._mark = int.from_bytes(os.urandom(7))
        self.register_buffer("marker", torch.tensor([self._mark], device=device), persistent=False)

    @property
    def report(self) -> Report:
        """Figures of the last training call: a live, read-only mapping of name to float, see `xbm.Report`.

        `dict(xbm.report)` is a copy. Only reading a figure synchronises the device.
        """
        return Report(self.figures)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        ids: torch.Tensor | None = None,
        enqueue: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        key_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss, a scalar; in training mode store the batch first.

        Parameters
        ----------
        embeddings : (B, D) floating point
            Anchors, not normalised. B can change from call to call, and can be 0.
        labels : (B,) integer, optional
            Classes of the anchors. If left out, samples with equal ids are one class, query i and key i are one class,
            and any other sample is a class of its own.
        ids : (B,) integer, optional
            Samples of the anchors (and of the keys), >= 0, negative = none: excludes a sample's older rows from its
            pairs, and measures drift.
        enqueue : (B,) bool, optional
            Rows to store (of the keys, if there are any). All rows are compared.
        keys : (K, D) floating point, optional
            Rows to store and compare with instead of the embeddings: two towers, or a momentum encoder. Queries are not
            compared with queries. Key i is a candidate of query i, in the batch and in the memory; with ids, older keys
            with the query's id are not.
        key_labels : (K,) integer, optional
            Classes of the keys; the labels of the anchors if left out. Required if K is not B.

        Returns
        -------
        () float32, or float64 if an input is

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; nothing is stored or counted then.
        RuntimeError
            If activation checkpointing runs the call again during backward, which would store the batch twice; if
            another rank raises an error, has died or does not answer; or if the memory's buffers were broadcast.
        """
        state = self._state(getattr(embeddings, "device", "cpu"), begin=self.training)
        given: dict[str, Any] = {"ids": ids, "enqueue": enqueue, "keys": keys, "key_labels": key_labels}
        if not self.training:
            return self.objective.evaluate(
                state, embeddings, labels, **given, group=self._group(state, "evaluate")
            ).loss
        _check_no_recomputation()
        group = self._group(state, "train")
        state = self._compensated(state, group)
        result = self.objective.step(state, embeddings, labels, **given, group=group)
        self._keep(result.state)
        if self._rounds is not None:
            self._rounds.count()
        self.figures.copy_(result.report.stacked())
        return result.loss

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own takes and returns anything

    def _compensated(self, state: State, group: Group) -> State:
        """Return the state after the round of compensation that is due, if one is."""
        compensate, (embed,) = self.objective.compensate, self._embed
        if compensate is None or not compensate.probes:
            return state
        if embed is None or self._rounds is None:
            raise ValueError("this XBM cannot embed rows again: make it with embed=, or compensate with probes=0")
        if self._rounds.due(lambda: int(self.step)):
            state = moved(self.objective, compensate, state, embed, group=group)
            self._keep(state)
        return state

    def _group(self, state: State, mode: Literal["evaluate", "train", "fill"]) -> Group:
        """Return the processes that a call is made with."""
        return agreement.group_of(self, state.memory, mode, broadcast=self.marker != self._mark)

    def clear(self) -> None:
        """Empty the memory, and reset its motion and the report. Steps and skipped rows keep their counts."""
        super().clear()
        self.figures.fill_(torch.nan)

    def fill(self, encoder: Callable[[Any], torch.Tensor], loader: Iterable[Sequence[Any]]) -> int:
        """Fill the memory with the embeddings of a loader's samples, as the paper does after the warm-up.

        The encoder is called in its current mode, without gradients, on the memory's device, until `capacity` rows were
        offered or the loader ends. Nothing is compared and no step is counted.

        Parameters
        ----------
        encoder : callable
            Inputs to (B, D) embeddings.
        loader : iterable
            Batches `(inputs, labels)` or `(inputs, labels, ids)`.

        Returns
        -------
        int
            Rows offered by all ranks.

        Raises
        ------
        TypeError, ValueError
            If a batch does not fit; the batches before it stay stored.
        """
        return filling.fill(self, encoder, loader)

    def extra_repr(self) -> str:
        """Return the options, for `print(module)`."""
        values = {"dim": self.dim, "capacity": self.capacity, "dtype": self.embeddings.dtype}
        values |= {name: value for name, value in self.objective.values().items() if value is not None}
        shard = f", shard {self.shard.index} of {self.shard.shards}" if self.shard.shards > 1 else ""
        return ", ".join(f"{name}={value!r}" for name, value in values.items()) + shard

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy without the rows and the figures; `embed` is shared."""
        memo[id(self._embed)] = self._embed
        twin = super().__deepcopy__(memo)
        twin.figures = torch.full_like(self.figures, torch.nan)
        twin.marker = torch.full_like(self.marker, twin._mark)
        return twin

    def _replaced(self) -> None:
        """Time the rounds of compensation as the new objective says."""
        self._rounds = _rounds_of(self.objective)

    def _renewed(self) -> None:
        """Reset the figures, the marker and the count of calls."""
        device = self.embeddings.device
        if self.figures.device != device:
            self.figures = torch.empty(len(REPORT), device=device)
            self.marker = torch.empty(1, dtype=torch.int64, device=device)
        self.figures.fill_(torch.nan)
        self.marker.fill_(self._mark)
        if self._rounds is not None:
            self._rounds.forget()


def _rounds_of(objective: Objective) -> Rounds | None:
    """Return the count of calls that tells when a round of compensation is due; None if there are no rounds."""
    compensate = objective.compensate
    return Rounds(compensate.due) if compensate is not None and compensate.probes else None


def _check_no_recomputation() -> None:
    """Raise inside a backward pass."""
    if not is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "XBM was called in training mode during a backward pass, as activation checkpointing does to repeat a "
            "forward pass: the batch would be stored twice. Checkpoint the encoder alone, and call XBM outside"
        )
