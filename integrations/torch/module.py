"""The PyTorch module: the core's step over a memory in buffers, its gradient attached to autograd."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self
from zlib import crc32

import torch
import torch.distributed as dist

from xbm import losses
from xbm.backends.torch import is_compiling
from xbm.compensation import Compensation, Motion
from xbm.integrations.pytorch_metric_learning import adapted
from xbm.integrations.torch.compensation import Embed, round_of
from xbm.integrations.torch.memory import Memory
from xbm.integrations.torch.ranks import Together, is_initialized
from xbm.integrations.torch.report import Report
from xbm.losses import LossLike, PairReduction
from xbm.memory import MemoryState
from xbm.mining import MinerLike
from xbm.objective import REPORT, Objective
from xbm.pairs import OfLabels
from xbm.ranks import ALONE, Group


class XBM(Memory):
    """In-batch loss plus memory loss; in training mode every call also stores its batch.

    L = (1/B) sum_i (L_i^batch + weight L_i^memory). Keep it beside the encoder, not inside it: an exported encoder
    then holds no memory. Saved and loaded with `state_dict`, training resumes exactly. A deep copy, such as an average
    of weights starts from, has the options and an empty memory.

    Once `torch.distributed` is initialised, a call in training mode is a call on all ranks, and all batches go into one
    memory, in rank order. The loss is that of the concatenated batch; the gradient of a rank's embeddings is multiplied
    by the number of ranks, since DDP and FSDP average. Keep it outside of DDP, or on DDP's list of buffers to ignore.

    Parameters
    ----------
    dim : int
        D, the embeddings' size.
    capacity : int
        M, the most rows the memory holds; about M x (4 D + 24) bytes in float32.
    loss : str, PairLoss, callable or pytorch-metric-learning loss
        The pair loss: a name among `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), an object, or
        a function `(S, positive, negative) -> (B,)`, see `xbm.losses.Differentiated`. One that is an `nn.Module`
        becomes a submodule: its learned parameters are among `xbm.parameters()`.
    miner : str, Miner, list of them or pytorch-metric-learning miner, optional
        Choice of the pairs that count: a name among `xbm.mining.MINERS` ("hard-negatives", ...), an object, or a list
        of them, each choosing among the pairs that the one before left.
    weight : float
        Weight of the memory term, at least 0.
    warmup : int
        Training calls before the memory term counts. Rows are stored meanwhile.
    settle : float, optional
        Squared distance, above 0: after `warmup` calls, the memory term counts from the first call on in which the
        running mean of the drift of samples that come back is at most this. Training calls then want `ids=`.
    ramp : int
        Calls over which the memory term's weight rises to `weight`; 0 = all of it at once.
    balance : float, optional
        How many times the in-batch term's gradient, with respect to normalised embeddings, the memory term's is long,
        before `weight` multiplies it. Not in evaluation.
    max_age : int, optional
        Calls, at least 1: memory rows that were stored more calls ago are in no pair.
    half_life : float, optional
        Calls, above 0, in which what a memory row counts for halves.
    reduction : {"mean", "mean-nonzero", "sum"}, optional
        Of a loss by name that has a choice, see `xbm.losses.get`: mean (default) over each anchor's positives and its
        active negatives, mean over all active pairs of the batch, or sum.
    in_batch : bool
        Whether the in-batch term counts.
    normalize : bool
        Compare and store x / max(|x|, 1e-6), so similarities are cosines in [-1, 1]; else x itself.
    dtype : torch.dtype
        What rows are stored in: float32, bfloat16, float16 or float64. `.half()` and `.to(dtype)` don't change it.
    copies : {"exclude", "keep", "replace"}
        With `ids=`, whether older rows of an anchor's own sample are left out of its pairs, or replaced: the memory
        then keeps one row per sample.
    match : callable, optional
        Which pairs are positive: a function `(labels (B,), row_labels (m,)) -> (B, m)` booleans, in place of equal
        labels. Every other pair is negative. One that is an `nn.Module` becomes a submodule, and moves along.
    pair_weights : callable, optional
        What a pair counts for: a function `(labels (B,), row_labels (m,)) -> (B, m), (1, m) or (B, 1)` floats, at
        least 0; 0 = no pair. See `xbm.LogQ`. One that is an `nn.Module` becomes a submodule, too.
    ignore_label : int, optional
        The class "other": its rows are positive to none, not even to each other, and negative to all.
    on_nonfinite : {"skip", "raise"}
        Leave rows with NaN or infinity out of the memory and count them, or raise (the device waits).
    compensate : Compensation, optional
        How the memory follows the network, see `xbm.Compensation`.
    embed : callable, optional
        From ids (n,), a tensor on the CPU, to the embeddings (n, D) of these samples, as in
        `lambda ids: encoder(images[ids])`: for `Compensation(probes=...)`. It is called without gradients; batch norm
        does as in training, but its running statistics stay as they are.
    device : torch.device, optional
        Where the memory lives; `.to(device)` moves it.
    shard : bool
        Whether each rank of the process group holds capacity / ranks of the rows, or all of them. A loss that sees
        whole rows is refused.
    group : ProcessGroup, optional
        The ranks that train together, all of them if left out. In training mode a call on one is a call on all of them.

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
        loss: LossLike = "contrastive",
        *,
        miner: MinerLike = None,
        weight: float = 1.0,
        warmup: int = 1000,
        settle: float | None = None,
        ramp: int = 0,
        balance: float | None = None,
        max_age: int | None = None,
        half_life: float | None = None,
        reduction: PairReduction | None = None,
        in_batch: bool = True,
        normalize: bool = True,
        dtype: torch.dtype = torch.float32,
        copies: Literal["exclude", "keep", "replace"] = "exclude",
        match: OfLabels | None = None,
        pair_weights: OfLabels | None = None,
        ignore_label: int | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        compensate: Compensation | None = None,
        embed: Embed | None = None,
        device: torch.types.Device = None,
        shard: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        pair_loss, pair_miner = adapted(loss, miner, dim=dim)
        objective = Objective(
            loss=losses.get(pair_loss, reduction),
            miner=pair_miner,
            weight=weight,
            warmup=warmup,
            settle=settle,
            ramp=ramp,
            balance=balance,
            max_age=max_age,
            half_life=half_life,
            in_batch=in_batch,
            normalize=normalize,
            copies=copies,
            match=match,
            pair_weights=pair_weights,
            ignore_label=ignore_label,
            on_nonfinite=on_nonfinite,
            compensate=compensate,
        )
        moves = objective.needs_motion
        super().__init__(dim, capacity, dtype=dtype, device=device, moves=moves, shard=shard, group=group)
        self.objective = objective
        if embed is not None and not callable(embed):
            raise TypeError(f"embed must be callable as embed(ids), got {embed!r:.80}")
        if (embed is None) == (compensate is not None and compensate.probes > 0):
            raise ValueError("embed(ids) is for Compensation(probes=...), whose rows it embeds anew: give both or none")
        # Not an attribute of its own: where it is a module, its weights are the encoder's, not ours.
        self._embed = (embed,)
        self._calls: int | None = None  # what the step is, once it was read
        if shard:
            self.objective.refuse_shards()
        for name, function in (("loss", loss), ("miner", miner), ("match", match), ("pair_weights", pair_weights)):
            if isinstance(function, torch.nn.Module):
                self.add_module(name, function)
        figures = torch.full((len(REPORT),), torch.nan, device=device)
        self.register_buffer("figures", figures, persistent=False)
        # A number of this process in a buffer and beside it: who broadcasts the buffers gives itself away.
        self._mark = int.from_bytes(os.urandom(7))
        self.register_buffer("marker", torch.tensor([self._mark], device=device), persistent=False)

    @property
    def report(self) -> Report:
        """The last training call's figures: a read-only mapping of name to float, live (`dict(xbm.report)` is a copy).

        Only reading a figure makes a device wait.

        `batch_loss` and `memory_loss`, the terms as they enter the loss; `fill`, in [0, 1]; `pairs` of anchors and
        memory rows with a non-zero weight; `drift`, mean squared distance between the new and old rows of samples that
        came back (with `ids=`, else NaN), and `drift_age`, its mean age in calls; `skipped`, rows not stored so far
        because they were not finite.
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
            Anchors, not normalised. B may change from call to call and may be 0.
        labels : (B,) integer, optional
            Classes of the anchors. Left out, each sample is a class of its own: those of equal ids are, and query i
            with key i.
        ids : (B,) integer, optional
            Samples of the anchors (and keys), >= 0, negative = none: keeps a sample's older rows out of its pairs, and
            measures drift.
        enqueue : (B,) bool, optional
            Rows to store (of the keys, if there are any); the others are compared all the same.
        keys : (K, D) floating point, optional
            Rows to store and to compare with instead of the embeddings: two towers, or a momentum encoder. Queries meet
            no queries. Key i is a candidate of query i, in the batch and in the memory; with ids, older keys of the
            query's id are not.
        key_labels : (K,) integer, optional
            Classes of the keys; those of the anchors if left out. Needed where K is not B.

        Returns
        -------
        () float32, or float64 if an input is

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; nothing has been stored or counted then.
        RuntimeError
            If activation checkpointing runs it once more during backward, which would store the batch twice; if another
            rank refuses its batch, has died or does not answer; or if somebody has broadcast the memory's buffers.
        """
        state = self._state(getattr(embeddings, "device", "cpu"), begin=self.training)
        given: dict[str, Any] = {"ids": ids, "enqueue": enqueue, "keys": keys, "key_labels": key_labels}
        if self.training:
            _refuse_recomputation()
            group = self._group(state, "train")
            state, motion = self._compensated(state, group)
            result = self.objective.step(state, embeddings, labels, **given, motion=motion, group=group)
            self._keep(result.state, result.motion)
            self._calls = None if self._calls is None else self._calls + 1
            self.figures.copy_(result.report)
        else:
            group, motion = self._group(state, "evaluate"), self._wanted(state)
            result = self.objective.evaluate(state, embeddings, labels, **given, motion=motion, group=group)
        return result.loss

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's own takes and returns anything

    def _compensated(self, state: MemoryState, group: Group) -> tuple[MemoryState, Motion | None]:
        """Return the memory and its motion after the round that is due, if one is."""
        compensate, (embed,), motion = self.objective.compensate, self._embed, self._wanted(state)
        if compensate is not None and compensate.probes and motion is not None:
            if embed is None:
                raise ValueError("this XBM cannot embed rows anew: give embed= when it is made, or probes=0")
            if self._calls is None:
                self._calls = int(self.step)
            if compensate.due(self._calls):
                state, motion = round_of(
                    compensate, state, motion, embed, normalize=self.objective.normalize, group=group
                )
                self._keep(state, motion)
        return state, motion

    def _wanted(self, state: MemoryState) -> Motion | None:
        """Return how the memory moves; None if the objective, which may have been replaced, does not ask."""
        if self.objective.needs_motion and not self.moves:
            raise ValueError("this memory does not move: give compensate= or settle= when the XBM is made")
        return self._motion(state) if self.objective.needs_motion else None

    def _group(self, state: MemoryState, mode: str) -> Group:
        """Return who a call is made with."""
        rank, size = (dist.get_rank(self.group), dist.get_world_size(self.group)) if is_initialized() else (0, 1)
        sharded = self.shard.shards > 1
        if sharded and self.shard != (rank, size):
            raise RuntimeError(
                f"this memory is shard {self.shard.index} of {self.shard.shards}, and this process is rank {rank} of "
                f"{size}: make it anew in the process group that it is used in, and load its state"
            )
        if size == 1 or (mode == "evaluate" and not sharded):
            return ALONE
        facts: dict[str, int | torch.Tensor] = {"capacity": self.capacity, "dim": self.dim, "shard": self.shard.shards}
        facts["mode (0 evaluation, 1 training, 2 fill)"] = ("evaluate", "train", "fill").index(mode)
        facts["options (a checksum: compare what print(xbm) shows)"] = self._options()
        facts |= {name: getattr(state, name) for name in ("step", "cursor", "count")}
        broadcast = self.marker != self._mark
        return Together(self.group, state.embeddings.device, sharded=sharded, facts=facts, broadcast=broadcast)

    def _options(self) -> int:
        """Return a checksum of the options, as far as they are values; what is a function has the same name."""
        o = self.objective
        values = (
            *(o.weight, o.warmup, o.in_batch, o.normalize, o.copies, o.on_nonfinite, o.ignore_label, o.compensate),
            *(o.settle, o.ramp, o.balance, o.max_age, o.half_life),
        )
        parts = [repr(one) if is_dataclass(one) else type(one).__name__ for one in (o.loss, *o.miners)]
        functions = [getattr(one, "__qualname__", type(one).__name__) for one in (o.match, o.pair_weights)]
        return crc32(repr((values, parts, functions, str(self.embeddings.dtype))).encode())

    def clear(self) -> None:
        """Empty the memory and the report. Steps and skipped rows count on: a warm-up that is over stays over."""
        super().clear()
        self.figures.fill_(torch.nan)

    def fill(self, encoder: Callable[[Any], torch.Tensor], loader: Iterable[Sequence[Any]]) -> int:
        """Fill the memory with the embeddings of a loader's samples, as the paper does once the warm-up is over.

        The encoder is called as it is (in the mode it is in) without gradients, on the memory's device, until
        `capacity` rows were offered or the loader ends. Nothing is compared and no step is counted.

        Parameters
        ----------
        encoder : callable
            Inputs to (B, D) embeddings.
        loader : iterable
            Batches `(inputs, labels)` or `(inputs, labels, ids)`.

        Returns
        -------
        int
            Rows offered, by all ranks.

        Raises
        ------
        TypeError, ValueError
            If a batch does not fit; batches before it stay stored.
        """
        device, offered, batches = self._state().embeddings.device, 0, iter(loader)
        while offered < self.capacity:
            group, batch = self._group(self._state(), "fill"), next(batches, None)
            if all(group.share(batch is None)):
                break
            try:
                x, labels, ids = self._encoded(encoder, batch, device)
            except Exception as error:
                group.meet(partial(_raise, error))  # tells the other ranks
                raise
            self._keep(self.objective.store(self._state(), x, labels, ids=ids, group=group))
            offered += sum(group.share(labels.shape[0]))
        return offered

    def _encoded(
        self, encoder: Callable[[Any], torch.Tensor], batch: Sequence[Any] | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return a loader's batch as embeddings, labels and ids; nothing where other ranks alone have one."""
        if batch is None:
            return torch.empty(0, self.dim, device=device), torch.empty(0, dtype=torch.int64, device=device), None
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise TypeError(f"loader must yield (inputs, labels) or (inputs, labels, ids), got {type(batch).__name__}")
        inputs, labels, ids = (*(one.to(device) if hasattr(one, "to") else one for one in batch), None)[:3]
        with torch.no_grad():
            return encoder(inputs), labels, ids

    def extra_repr(self) -> str:
        """Return the options, for `print(module)`."""
        o = self.objective
        relation = ("match", "pair_weights", "ignore_label", "compensate")
        optional = (*relation, "settle", "balance", "max_age", "half_life")
        given = [f", {name}={getattr(o, name)!r}" for name in optional if getattr(o, name) is not None]
        ramp = f", ramp={o.ramp}" if o.ramp else ""
        shard = f", shard {self.shard.index} of {self.shard.shards}" if self.shard.shards > 1 else ""
        return (
            f"dim={self.dim}, capacity={self.capacity}, loss={o.loss!r}, miner={o.miner!r}, weight={o.weight}, "
            f"warmup={o.warmup}{ramp}, in_batch={o.in_batch}, normalize={o.normalize}, dtype={self.embeddings.dtype}, "
            f"copies={o.copies!r}, on_nonfinite={o.on_nonfinite!r}{''.join(given)}{shard}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy without the rows and their figures; `embed` is the same one."""
        memo[id(self._embed)] = self._embed
        twin = super().__deepcopy__(memo)
        twin.figures = torch.full_like(self.figures, torch.nan)
        twin.marker = torch.full_like(self.marker, twin._mark)
        return twin

    def _renewed(self) -> None:
        """Forget the figures of before."""
        device = self.embeddings.device
        if self.figures.device != device:
            self.figures = torch.empty(len(REPORT), device=device)
            self.marker = torch.empty(1, dtype=torch.int64, device=device)
        self.figures.fill_(torch.nan)
        self.marker.fill_(self._mark)
        self._calls = None


def _raise(error: Exception) -> NoReturn:
    raise error


def _refuse_recomputation() -> None:
    """Refuse to run inside a backward pass."""
    if not is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "XBM was called in training mode during a backward pass, as activation checkpointing does to run a forward "
            "twice: the batch would be stored twice. Checkpoint the encoder, and call the XBM outside"
        )
