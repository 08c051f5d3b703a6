"""The callback: the memory's loss for any model that `fit` trains."""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import keras

from xbm import checks
from xbm.integrations.keras import attachment, host, selection
from xbm.integrations.keras.attachment import Attachment
from xbm.integrations.keras.compensation import Data, Embedding
from xbm.integrations.keras.graph import eagerly, refuse_replicas
from xbm.integrations.keras.memory import integer_dtype, row_dtype
from xbm.integrations.keras.metric import MemoryMetric
from xbm.integrations.keras.selection import Field, Outputs
from xbm.losses import LossLike
from xbm.memory_state import Rows
from xbm.objective import Objective, Options, objective_of
from xbm.options import accepts
from xbm.report import REPORT


@accepts(Objective)
class XBMCallback(keras.callbacks.Callback):
    """Adds the in-batch loss and the memory loss to the loss that a model was compiled with, while `fit` trains it.

    L = compile's loss + (1/B) sum_i (L_i^batch + weight L_i^memory). `History` and the progress bar get `memory_loss`,
    `memory_pairs`, `memory_fill` and, with `ids=`, `memory_drift`; with maps of `compensate`, also
    `memory_drift_before` and `memory_drift_after`. Validation compares with the memory as it is and stores nothing.
    After `fit` the model is unchanged, but for the attribute `xbm_memory`, which `save_weights` saves; another `fit`
    with this callback continues with that memory.

    Parameters
    ----------
    capacity : int
        M, the most rows the memory holds; about M x (4 D + 24) bytes in float32.
    loss : str, PairLoss or callable
        Pair loss of both terms: a name among `xbm.losses.LOSSES` ("contrastive", "triplet", "nt-xent", ...), a loss, or
        a function `(S, positive, negative) -> (B,)`.
    objective : Objective, optional
        The loss and all options in one object, in place of `loss` and the options below. Set `in_batch=False` if the
        loss of `compile` is the in-batch loss already.
    dtype : str
        Dtype of the stored rows: "float32", "bfloat16", "float16" or "float64".
    data : array, dict or tuple of arrays, or callable, optional
        For `Compensation(probes=...)`, with `ids=`: NumPy arrays whose row i is sample i; or a function of ids (n,), a
        NumPy array, that returns inputs of the model, as in `lambda ids: load(paths[ids])`. The model embeds these
        samples as in training, without gradients. The model is unchanged, including batch norm's running statistics.
    embeddings : str or callable, optional
        The output that is the embedding: the name of an output or of a layer, or a function of y_pred. The only output
        if left out.
    labels, ids : str or callable, optional
        Where classes and samples are: a key of y or x, or a function `(x, y) -> (B,)`. If left out, labels are y, or
        the embedding's part of it, and there are no ids.
    dim : int, optional
        D, the embeddings' size. Needed only on JAX, for a model whose output size is unknown before it runs.
    {options}

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
        loss: LossLike | None = None,
        *,
        objective: Objective | None = None,
        dtype: str = "float32",
        data: Data = None,
        embeddings: str | Callable[[Any], Any] | None = None,
        labels: Field = None,
        ids: Field = None,
        dim: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        checks.whole_number("capacity", capacity, at_least=1)
        if dim is not None:
            checks.whole_number("dim", dim, at_least=1)
        self.objective = objective_of(objective, loss, options)
        compensate = self.objective.compensate
        probes = compensate is not None and compensate.probes > 0
        if (data is None) == probes:
            raise ValueError("data is for Compensation(probes=...), whose rows it embeds: pass both or neither")
        if probes and ids is None:
            raise ValueError("Compensation(probes=...) finds samples in data by their ids: pass ids= as well")
        self.capacity, self.dtype, self.dim = capacity, row_dtype(dtype), dim
        self.embeddings, self.labels, self.ids = embeddings, labels, ids
        self.memory: Any = None  # MemoryMetric, once there is a model
        self._outputs: Any = None  # Outputs
        self._embedding = Embedding(self.objective, compensate, data) if compensate and probes else None
        self._attachment: Attachment | None = None
        self._of: keras.Model | None = None  # the model of the memory
        self._fitting = False

    def attach(self, model: keras.Model) -> MemoryMetric:
        """Attach the memory to a model, so that `load_weights` fills it before `fit`, which attaches it otherwise.

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
            raise RuntimeError("the memory was lost in a step that failed: continue with a new XBMCallback")
        super().set_model(model)
        attachment.place(model, self.memory)
        self._begin()
        return self.memory

    @property
    def report(self) -> Mapping[str, float]:
        """Figures of the last training step, {name: float}, see `xbm.Report`; empty before the first step."""
        if not self._readable():
            return {}
        return dict(zip(REPORT, keras.ops.convert_to_numpy(self.memory.figures.value).tolist(), strict=True))

    def rows(self) -> Rows:
        """Return the filled rows as NumPy arrays, oldest first: `embeddings` (n, D), `labels`, `ids`, `stored_at`."""
        if not self._readable():
            raise RuntimeError("there are no rows before fit")
        return self.memory.rows()

    def set_model(self, model: keras.Model) -> None:
        """Add the memory's loss to a model that is about to run."""
        if self._embedding is not None and model.steps_per_execution > 1:
            raise ValueError(
                f"Compensation(probes=...) moves the memory between steps, but steps_per_execution="
                f"{model.steps_per_execution} runs several at once: compile with 1, or compensate without probes"
            )
        self._detach()
        self._fitting = False
        memory = self.attach(model)
        if self._embedding is not None:
            self._embedding.begin(model, self._outputs)
        memory.attachment = self._attachment = Attachment(model, self._term)
        self._outputs.watch()
        self._attachment.on()

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that this callback is the only one, and on JAX check the data while they are on the host."""
        placed: Any = getattr(self.model, attachment.MEMORY, None)
        if placed is not self.memory:
            self._detach()
            raise RuntimeError("fit was given two XBMCallbacks: a model has one memory")
        self._fitting = True
        if keras.backend.backend() == "jax":
            if not self.memory.begun:
                raise ValueError(
                    f"the size of the embeddings of {type(self.model).__name__} is unknown before it runs: pass dim="
                )
            function = host.remembering(self.model.train_function, self.model, self.memory)
            self.model.train_function = self._looked_at(function)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Make the round of compensation that is due; the step is read from the device once an epoch."""
        if self._embedding is not None and batch == 0:
            self._embedding.rounds.forget()
        if self._embedding is not None and self._embedding.due(self.memory):
            self._embedding.move(self.memory, self.model)

    def on_test_begin(self, logs: Any = None) -> None:
        """On JAX, check the data while they are on the host."""
        if keras.backend.backend() == "jax" and not hasattr(self.model.test_function, "of_xbm"):
            self.model.test_function = self._looked_at(self.model.test_function)
            self.model.test_function.of_xbm = True

    def on_train_end(self, logs: Any = None) -> None:
        """Restore the model."""
        self._fitting = False
        self._detach()

    def on_test_end(self, logs: Any = None) -> None:
        """Restore a model that was only evaluated."""
        if not self._fitting:
            self._detach()

    on_predict_end = on_test_end

    def _readable(self) -> bool:
        """Return whether there is a memory; on JAX, reading `self.model` brings its variables up to date."""
        return self.model is not None and self.memory is not None and self.memory.begun

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.off()
            self._outputs.unwatch()
            if self.memory.attachment is self._attachment:
                self.memory.attachment = None
            self._attachment = None

    def _begin(self, dim: int | None = None) -> None:
        """Make the memory's variables, if they do not exist and their size is known."""
        if not self.memory.begun:
            dim = dim or self.dim or self._outputs.dim()
            if dim is not None:
                with eagerly():
                    self.memory.begin(dim)

    def _read(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return a batch's labels and ids."""
        names = getattr(self._of, "output_names", None) or []  # not `self.model`, which synchronises JAX's state
        field = self.labels
        if field is None and isinstance(self.embeddings, str) and selection.has(y, self.embeddings, names):
            field = self.embeddings
        labels = selection.integers("labels", field, x, y, names)
        return labels, None if self.ids is None else selection.integers("ids", self.ids, x, y, names)

    def _term(self, x: Any, y: Any, y_pred: Any, *, training: bool) -> Any:
        """Return the loss of a batch, and keep the state after a training step."""
        embeddings = self._outputs.of(y_pred)
        labels, ids = self._read(x, y)
        labels = keras.ops.convert_to_tensor(labels)
        ids = None if ids is None else keras.ops.convert_to_tensor(ids)
        self._begin(embeddings.shape[-1])
        before = self.memory.state()
        if training:
            result = self.objective.step(before, embeddings, labels, ids=ids)
            self.memory.keep(before, result.state)
        else:
            # The gradient is cheap beside the model's forward pass, and brings the number of pairs.
            result = self.objective.evaluate(before, embeddings, labels, ids=ids, gradient=True)
        self.memory.record(result.report, keras.ops.shape(embeddings)[0], training=training)
        return result.loss

    def _looked_at(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return JAX's train or test function with a check for integers that JAX would truncate."""
        if integer_dtype() == "int64":
            return function

        def check(batch: Any) -> None:
            x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
            for name, integers in zip(("labels", "ids"), self._read(x, y), strict=True):
                host.refuse_large(name, integers)

        return host.checked(function, check)
