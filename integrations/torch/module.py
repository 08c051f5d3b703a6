"""The PyTorch module: buffers, devices and saving around the core's step."""

import array_api_compat.torch as xp
import torch

from xbm import losses, memory
from xbm.backends.torch import attach_gradient
from xbm.integrations.torch.report import Report
from xbm.memory import MemoryState
from xbm.objective import REPORT, Objective


class XBM(torch.nn.Module):
    """In-batch loss plus memory loss; in training mode every call also stores its batch.

    L = (1/B) sum_i (L_i^batch + weight L_i^memory). Keep it beside the encoder, not inside it: an exported encoder
    then holds no memory. Saved and loaded with `state_dict`, training resumes exactly.

    Parameters
    ----------
    dim : int
        D, the embeddings' size.
    capacity : int
        M, the most rows the memory holds; about M x (4 D + 24) bytes in float32.
    loss : str or PairLoss
        The pair loss, by name ("contrastive") or as an object.
    miner : Miner, optional
        Choice of the pairs that count.
    weight : float
        Weight of the memory term, at least 0.
    warmup : int
        Training calls before the memory term counts. Rows are stored meanwhile.
    reduction : {"mean", "sum"}, optional
        Of a loss given by name: mean (default) over each anchor's positives and its active negatives, or sum.
    in_batch : bool
        Whether the in-batch term counts.
    normalize : bool
        Compare and store x / max(|x|, 1e-6), so similarities are cosines in [-1, 1]; else x itself.
    dtype : torch.dtype
        What rows are stored in: float32, bfloat16, float16 or float64. `.half()` and `.to(dtype)` don't change it.
    copies : {"exclude", "keep"}
        With `ids=`, whether older rows of an anchor's own sample are left out of its pairs.
    on_nonfinite : {"skip", "raise"}
        Leave rows with NaN or infinity out of the memory and count them, or raise (the device waits).
    device : torch.device, optional
        Where the memory lives; `.to(device)` moves it.

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

    def __init__(
        self,
        dim,
        capacity,
        loss="contrastive",
        *,
        miner=None,
        weight=1.0,
        warmup=1000,
        reduction=None,
        in_batch=True,
        normalize=True,
        dtype=torch.float32,
        copies="exclude",
        on_nonfinite="skip",
        device=None,
    ):
        super().__init__()
        self.objective = Objective(
            loss=losses.get(loss, reduction),
            miner=miner,
            weight=weight,
            warmup=warmup,
            in_batch=in_batch,
            normalize=normalize,
            copies=copies,
            on_nonfinite=on_nonfinite,
        )
        state = memory.init(capacity=capacity, dim=dim, dtype=dtype, device=device, xp=xp)
        for name, value in state._asdict().items():
            self.register_buffer(name, value)
        figures = torch.full((len(REPORT),), torch.nan, device=device)
        self.register_buffer("figures", figures, persistent=False)

    @property
    def capacity(self):
        """M, the most rows the memory holds."""
        return self.embeddings.shape[0]

    @property
    def dim(self):
        """D, the embeddings' size."""
        return self.embeddings.shape[1]

    @property
    def report(self):
        """The last training call's figures: a read-only mapping of name to float, live (`dict(xbm.report)` is a copy).

        Only reading a figure makes a device wait.

        `batch_loss` and `memory_loss`, the terms as they enter the loss; `fill`, in [0, 1]; `pairs` of anchors and
        memory rows with a non-zero weight; `drift`, mean squared distance between the new and old rows of samples that
        came back (with `ids=`, else NaN), and `drift_age`, its mean age in calls; `skipped`, rows not stored so far
        because they were not finite.
        """
        return Report(self.figures)

    def forward(self, embeddings, labels, *, ids=None, enqueue=None, keys=None, key_labels=None):
        """Return the loss, a scalar; in training mode store the batch first.

        Parameters
        ----------
        embeddings : (B, D) floating point
            Anchors, not normalised. B may change from call to call and may be 0.
        labels : (B,) integer
            Classes of the anchors.
        ids : (B,) integer, optional
            Samples of the anchors, >= 0, negative = none: keeps a sample's older rows out of its pairs, and measures
            drift.
        enqueue : (B,) bool, optional
            Rows to store (of the keys, if there are any); the others are compared all the same.
        keys : (K, D) floating point, optional
            Rows to store and to compare with instead of the embeddings: two towers, or a momentum encoder. Key i is a
            candidate of query i.
        key_labels : (K,) integer, optional
            Classes of the keys; those of the anchors if left out.

        Returns
        -------
        () float32, or float64 if an input is

        Raises
        ------
        TypeError, ValueError
            If an input does not fit; nothing has been stored or counted then.
        """
        state = self._state()
        x, k = _wide(embeddings), _wide(keys)
        given = {"ids": ids, "keys": k, "key_labels": key_labels}
        if self.training:
            result = self.objective.step(state, x, labels, enqueue=enqueue, **given)
            self._keep_state(result.state)
            self.figures.copy_(result.report)
        else:
            gradient = torch.is_grad_enabled() and any(
                getattr(one, "requires_grad", False) for one in (embeddings, keys)
            )
            result = self.objective.evaluate(state, x, labels, enqueue=enqueue, gradient=gradient, **given)
        if result.gradient is None:
            return result.loss
        pairs = [(embeddings, result.gradient)]
        if keys is not None:
            pairs.append((keys, result.key_gradient))
        return attach_gradient(result.loss, *pairs)

    def clear(self):
        """Empty the memory and the report. Steps and skipped rows count on: a warm-up that is over stays over."""
        self._keep_state(memory.clear(self._state()))
        self.figures.fill_(torch.nan)

    def fill(self, encoder, loader):
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
            Rows offered.

        Raises
        ------
        TypeError, ValueError
            If a batch does not fit; batches before it stay stored.
        """
        device, offered = self.embeddings.device, 0
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
                raise TypeError(
                    f"loader must yield (inputs, labels) or (inputs, labels, ids), got {type(batch).__name__}"
                )
            inputs, labels, ids = (*(one.to(device) if hasattr(one, "to") else one for one in batch), None)[:3]
            with torch.no_grad():
                x = _wide(encoder(inputs))
            self._keep_state(self.objective.store(self._state(), x, labels, ids=ids))
            offered += labels.shape[0]
            if offered >= self.capacity:
                break
        return offered

    def rows(self):
        """Return copies of the filled rows, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at` (n,)."""
        return memory.rows(self._state())

    def extra_repr(self):
        """Return the options, for `print(module)`."""
        o = self.objective
        return (
            f"dim={self.dim}, capacity={self.capacity}, loss={o.loss!r}, miner={o.miner!r}, weight={o.weight}, "
            f"warmup={o.warmup}, in_batch={o.in_batch}, normalize={o.normalize}, dtype={self.embeddings.dtype}, "
            f"copies={o.copies!r}, on_nonfinite={o.on_nonfinite!r}"
        )

    def _state(self):
        return MemoryState(*(getattr(self, name) for name in MemoryState._fields))

    def _keep_state(self, state):
        """Copy into the buffers what was not written there in place."""
        for name, value in state._asdict().items():
            buffer = getattr(self, name)
            if value is not buffer:
                buffer.copy_(value)

    def _apply(self, fn, recurse=True):
        """Let `.to(device)` move the memory, and keep its dtypes through `.half()` and `.to(dtype)`."""

        def keeping_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping_dtype, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """Take a memory of any capacity, its newest rows, and take it whole or not at all."""
        state_dict, fitted = dict(state_dict), None
        present = [prefix + name for name in MemoryState._fields if prefix + name in state_dict]
        saved = [state_dict.pop(key) for key in present]
        if len(present) == len(MemoryState._fields):
            try:
                fitted = self._fitted(MemoryState(*saved))
            except ValueError as problem:
                errors.append(f"The memory was left as it is. The saved one cannot be loaded: {problem}")
        if fitted is not None:
            state_dict |= zip(present, fitted, strict=True)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        missing_keys[:] = [key for key in missing_keys if key not in present]
        if fitted is not None:
            if self.figures.device != self.embeddings.device:
                self.figures = torch.empty_like(self.figures, device=self.embeddings.device)
            self.figures.fill_(torch.nan)

    def _fitted(self, saved):
        """Return a saved memory in this one's capacity and dtypes, or raise a ValueError that says why not."""
        for name, value in saved._asdict().items():
            if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
                raise ValueError(f"{name} must be a dense tensor with values, got {type(value).__name__} {value!r:.60}")
        problem = memory.inconsistency(saved)
        if problem:
            raise ValueError(problem)
        if saved.embeddings.shape[1] != self.dim:
            raise ValueError(f"it holds rows of {saved.embeddings.shape[1]} dimensions, this one of {self.dim}")
        fitted = saved if saved.labels.shape[0] == self.capacity else memory.resize(saved, self.capacity)
        fitted = MemoryState(*(one.to(getattr(self, name).dtype) for name, one in fitted._asdict().items()))
        if not torch.isfinite(fitted.embeddings).all():
            raise ValueError(
                f"some of its rows, in {saved.embeddings.dtype}, are not finite in {self.embeddings.dtype}"
            )
        return fitted


def _wide(x):
    """Return x detached and in float32 if it is half precision, so that its gradient is rounded only once."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
