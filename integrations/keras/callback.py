"""The callback: the memory's loss for any model that `fit` trains."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras

from xbm import checks, losses
from xbm.compensation import Compensation
from xbm.integrations.keras import attachment, host, selection
from xbm.integrations.keras.attachment import Attachment
from xbm.integrations.keras.compensation import Data, Rounds
from xbm.integrations.keras.graph import eagerly, refuse_replicas
from xbm.integrations.keras.memory import integer_dtype, row_dtype
from xbm.integrations.keras.metric import MemoryMetric
from xbm.integrations.keras.selection import Field, Outputs
from xbm.losses import LossLike, PairReduction
from xbm.memory import Rows
from xbm.mining import MinerLike
from xbm.objective import REPORT, Objective
from xbm.pairs import OfLabels


class XBMCallback(keras.callbacks.Callback):
    """Adds the in-batch and the memory loss to whatever a model is compiled with, while `fit` trains it.

    L = compile's loss + (1/B) sum_i (L_i^batch + weight L_i^memory). `History` and the progress bar get `memory_loss`,
    `memory_pairs`, `memory_fill` and, with `ids=`, `memory_drift`. Validation compares with the memory as it is and
    stores nothing. After `fit` the model is as it was, with the memory as its attribute `xbm_memory`, which
    `save_weights` saves; another `fit` with this callback goes on with it.

    Parameters
    ----------
    capacity : int
        M, the most rows the memory holds; about M x (4 D + 24) bytes in float32.
    loss : str, PairLoss or callable
        The pair loss: a name among `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), an object, or
        a function `(S, positive, negative) -> (B,)`.
    miner : str, Miner or list of them, optional
        Choice of the pairs that count: a name among `xbm.mining.MINERS` ("hard-negatives", ...), an object, or a list
        of them, each choosing among the pairs that the one before left.
    weight : float
        Weight of the memory term, at least 0.
    warmup : int
        Training steps before the memory term counts. Rows are stored meanwhile.
    settle : float, optional
        Squared distance, above 0: after `warmup` steps, the memory term counts from the first step on in which the
        running mean of the drift of samples that come back is at most this. It wants `ids=`.
    ramp : int
        Steps over which the memory term's weight rises to `weight`; 0 = all of it at once.
    balance : float, optional
        How many times the in-batch term's gradient, with respect to normalised embeddings, the memory term's is long,
        before `weight` multiplies it.
    max_age : int, optional
        Steps, at least 1: memory rows that were stored more steps ago are in no pair.
    half_life : float, optional
        Steps, above 0, in which what a memory row counts for halves.
    reduction : {"mean", "mean-nonzero", "sum"}, optional
        Of a loss by name that has a choice, see `xbm.losses.get`: mean (default) over each anchor's positives and its
        active negatives, mean over all active pairs of the batch, or sum.
    in_batch : bool
        Whether the in-batch term counts. False where compile's loss is the in-batch loss already.
    normalize : bool
        Compare and store x / max(|x|, 1e-6), so similarities are cosines in [-1, 1]; else x itself.
    dtype : str
        What rows are stored in: "float32", "bfloat16", "float16" or "float64".
    copies : {"exclude", "keep", "replace"}
        With `ids=`, whether older rows of an anchor's own sample are left out of its pairs, or replaced: the memory
        then keeps one row per sample.
    match : callable, optional
        Which pairs are positive: a function `(labels (B,), row_labels (m,)) -> (B, m)` booleans, in place of equal
        labels. Every other pair is negative.
    pair_weights : callable, optional
        What a pair counts for: a function `(labels (B,), row_labels (m,)) -> (B, m), (1, m) or (B, 1)` floats, at
        least 0; 0 = no pair. See `xbm.LogQ`.
    ignore_label : int, optional
        The class "other": its rows are positive to none, not even to each other, and negative to all.
    on_nonfinite : {"skip", "raise"}
        Leave rows with NaN or infinity out of the memory and count them, or raise (with `run_eagerly=True`).
    compensate : Compensation, optional
        How the memory follows the network, see `xbm.Compensation`. With `probes` or `returning`, `History` also gets
        `memory_drift_before` and `memory_drift_after`.
    data : array, dict or tuple of arrays, or callable, optional
        For `Compensation(probes=...)`, with `ids=`: NumPy arrays whose row i is sample i, or a function of ids (n,), a
        NumPy array, as in `lambda ids: load(paths[ids])`, to what the model takes. The model embeds these samples as
        in training, without gradient; nothing of it changes, not even batch norm's running statistics.
    embeddings : str or callable, optional
        Which output is the embedding: the name of an output or of a layer, or a function of y_pred; the only output
        if left out.
    labels, ids : str or callable, optional
        Where the classes and the samples are: a key of y or x, or a function `(x, y) -> (B,)`. If left out, labels are
        y, or the embedding's part of it, and there are no ids.
    dim : int, optional
        D, the embeddings' size; needed only for a model on JAX that does not tell before it runs.

    Raises
    ------
    TypeError, ValueError
        If an option is out of range, saying what is accepted.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from xbm.integrations.keras import XBMCallback
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(8)])
    >>> model.compile("adam")
    >>> x, y = np.random.rand(64, 20), np.arange(64) % 5
    >>> history = model.fit(x, y, batch_size=16, verbose=0, callbacks=[XBMCallback(capacity=256, warmup=2)])
    >>> history.history["memory_fill"]
    [0.25]

    References
    ----------
    Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv 1912.06798.
    """

    def __init__(
        self,
        capacity: int = 8192,
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
        dtype: str = "float32",
        copies: Literal["exclude", "keep", "replace"] = "exclude",
        match: OfLabels | None = None,
        pair_weights: OfLabels | None = None,
        ignore_label: int | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        compensate: Compensation | None = None,
        data: Data = None,
        embeddings: str | Callable[[Any], Any] | None = None,
        labels: Field = None,
        ids: Field = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        checks.whole_number("capacity", capacity, at_least=1)
        if dim is not None:
            checks.whole_number("dim", dim, at_least=1)
        self.objective = Objective(
            loss=losses.get(loss, reduction),
            miner=miner,
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
        probes = compensate is not None and compensate.probes > 0
        if (data is None) == probes:
            raise ValueError("data is for Compensation(probes=...), whose rows it embeds anew: give both or none")
        if probes and ids is None:
            raise ValueError("Compensation(probes=...) finds samples in data by their ids: say by ids= where these are")
        self.capacity, self.dtype, self.dim = capacity, row_dtype(dtype), dim
        self.embeddings, self.labels, self.ids = embeddings, labels, ids
        self.memory: Any = None  # MemoryMetric, once there is a model
        self._outputs: Any = None  # Outputs
        self._rounds = Rounds(compensate, data, normalize=normalize) if compensate and probes else None
        self._attachment: Attachment | None = None
        self._of: keras.Model | None = None  # the model that the memory is of
        self._fitting = False

    def attach(self, model: keras.Model) -> MemoryMetric:
        """Put the memory on a model, so that its `load_weights` fills it before `fit`; `fit` does it by itself.

        Returns
        -------
        MemoryMetric
            With `rows()` and `clear()`; also the model's attribute `xbm_memory`.
        """
        refuse_replicas(getattr(model, "distribute_strategy", None))
        if self._of is not model:
            self.memory = MemoryMetric(self.capacity, self.dtype, self.objective, with_drift=self.ids is not None)
            self._of, self._outputs = model, Outputs(model, self.embeddings)
        if self.memory.lost:
            raise RuntimeError("the memory was lost in a step that failed half-way: go on with a new XBMCallback")
        super().set_model(model)
        attachment.place(model, self.memory)
        self._begin()
        return self.memory

    @property
    def report(self) -> Mapping[str, float]:
        """The last training step's figures, {name: float}, as in `xbm.REPORT`; empty before there was one."""
        if not self._readable():
            return {}
        return dict(zip(REPORT, keras.ops.convert_to_numpy(self.memory.figures.value).tolist(), strict=True))

    def rows(self) -> Rows:
        """Return the filled rows, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at` (n,), of NumPy."""
        if not self._readable():
            raise RuntimeError("there are no rows before fit")
        return self.memory.rows()

    def set_model(self, model: keras.Model) -> None:
        """Add the memory's loss to a model that is about to run."""
        if self._rounds is not None and model.steps_per_execution > 1:
            raise ValueError(
                f"Compensation(probes=...) moves the memory between steps, which steps_per_execution="
                f"{model.steps_per_execution} runs at once: compile with 1, or compensate without probes"
            )
        self._detach()
        self._fitting = False
        memory = self.attach(model)
        if self._rounds is not None:
            self._rounds.begin(model, self._outputs)
        memory.attachment = self._attachment = Attachment(model, self._term)
        self._outputs.watch()
        self._attachment.on()

    def on_train_begin(self, logs: Any = None) -> None:
        """See that this callback is the only one, and on JAX look at the data while they are on the host."""
        placed: Any = getattr(self.model, attachment.MEMORY, None)
        if placed is not self.memory:
            self._detach()
            raise RuntimeError("fit was given two XBMCallbacks: a model has one memory")
        self._fitting = True
        if keras.backend.backend() == "jax":
            if not self.memory.begun:
                raise ValueError(
                    f"{type(self.model).__name__} does not tell the size of its embeddings before it runs: give dim="
                )
            function = host.remembering(self.model.train_function, self.model, self.memory)
            self.model.train_function = self._looked_at(function)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Embed some rows anew and move the memory, where a round is due; steps are read once an epoch."""
        if self._rounds is not None and batch == 0:
            self._rounds.calls = None
        if self._rounds is not None and self._rounds.due(self.memory):
            self._rounds.move(self.memory, self.model)

    def on_test_begin(self, logs: Any = None) -> None:
        """On JAX, look at the data while they are on the host."""
        if keras.backend.backend() == "jax" and not hasattr(self.model.test_function, "of_xbm"):
            self.model.test_function = self._looked_at(self.model.test_function)
            self.model.test_function.of_xbm = True

    def on_train_end(self, logs: Any = None) -> None:
        """Leave the model as it was."""
        self._fitting = False
        self._detach()

    def on_test_end(self, logs: Any = None) -> None:
        """Leave a model that was only evaluated as it was."""
        if not self._fitting:
            self._detach()

    on_predict_end = on_test_end

    def _readable(self) -> bool:
        """Tell whether there is a memory; on JAX its variables are brought up to date by asking for `model`."""
        return self.model is not None and self.memory is not None and self.memory.begun

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.off()
            self._outputs.unwatch()
            if self.memory.attachment is self._attachment:
                self.memory.attachment = None
            self._attachment = None

    def _begin(self, dim: int | None = None) -> None:
        """Make the memory's variables, if they are not there and their size is known."""
        if not self.memory.begun:
            dim = dim or self.dim or self._outputs.dim()
            if dim is not None:
                with eagerly():
                    self.memory.begin(dim)

    def _read(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return a batch's labels and ids."""
        names = getattr(self._of, "output_names", None) or []  # not `self.model`: on JAX that is a look between steps
        field = self.labels
        if field is None and isinstance(self.embeddings, str) and selection.has(y, self.embeddings, names):
            field = self.embeddings
        labels = selection.integers("labels", field, x, y, names)
        return labels, None if self.ids is None else selection.integers("ids", self.ids, x, y, names)

    def _term(self, x: Any, y: Any, y_pred: Any, *, training: bool) -> Any:
        """Return the loss of a batch, and keep what a training step makes of the memory."""
        embeddings = self._outputs.of(y_pred)
        labels, ids = self._read(x, y)
        labels = keras.ops.convert_to_tensor(labels)
        ids = None if ids is None else keras.ops.convert_to_tensor(ids)
        self._begin(embeddings.shape[-1])
        before, given = self.memory.state(), {"ids": ids, "motion": self.memory.motion()}
        if training:
            result = self.objective.step(before, embeddings, labels, **given)
            self.memory.keep(before, result.state, result.motion)
        else:
            # With the gradient, which is small beside the model's forward pass, come the pairs in use.
            result = self.objective.evaluate(before, embeddings, labels, **given, gradient=True)
        self.memory.record(result.report, keras.ops.shape(embeddings)[0], training=training)
        return result.loss

    def _looked_at(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return JAX's train or test function, refusing integers that are too large before they are cut off."""
        if integer_dtype() == "int64":
            return function

        def check(batch: Any) -> None:
            x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
            for name, integers in zip(("labels", "ids"), self._read(x, y), strict=True):
                host.refuse_large(name, integers)

        return host.checked(function, check)
