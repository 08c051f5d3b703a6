"""On an accelerator: the same step as on the CPU, without a device sync. Run with `tox -e gpu`."""

import numpy as np
import pytest

import xbm

pytestmark = pytest.mark.gpu


def batches(seed=0):
    """Yield `(x, labels, ids)` as NumPy arrays, with several batch sizes and repeated samples."""
    rng = np.random.default_rng(seed)
    for size in (64, 64, 17, 64, 1, 64):
        ids = rng.integers(300, size=size)
        yield rng.normal(size=(size, 32)).astype(np.float32), ids % 30, ids


@pytest.mark.parametrize("loss", ["contrastive", "multi-similarity", "batch-hard-triplet", "supcon"])
@pytest.mark.parametrize("library", ["torch", "jax", "tensorflow"])
def test_a_step_is_numpys(library, loss):
    xp, put = LIBRARIES[library]()
    objective = xbm.Objective(loss=loss, warmup=1)
    state = objective.init(capacity=200, dim=32, xp=xp, device=put(np.zeros(1)).device)
    plain = objective.init(capacity=200, dim=32)
    for batch in batches():
        x, labels, ids = map(put, batch)
        result, expected = objective.step(state, x, labels, ids=ids), objective.step(plain, *batch[:2], ids=batch[2])
        state, plain = result.state, expected.state
        np.testing.assert_allclose(host(result.loss), expected.loss, rtol=1e-4)
        np.testing.assert_allclose(host(result.gradient), expected.gradient, rtol=1e-3, atol=1e-5)
        for one, other in zip(state.memory[1:], plain.memory[1:], strict=True):
            np.testing.assert_array_equal(host(one), other)


@pytest.mark.parametrize("options", [{}, {"loss": "multi-similarity", "miner": "multi-similarity"}], ids=str)
def test_torchs_module_never_waits(options):
    torch = pytest.importorskip("torch")
    from xbm.integrations.torch import XBM

    module = XBM(32, 200, warmup=1, device="cuda", **options)
    history = [tuple(torch.from_numpy(one).cuda() for one in batch) for batch in batches()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, labels, ids in history:
            with torch.autocast("cuda", torch.float16):
                module(x.requires_grad_(), labels, ids=ids).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(x.grad).all() for x, _, _ in history)


def _torch():
    torch = pytest.importorskip("torch")
    import array_api_compat.torch as xp

    return xp, lambda x: torch.from_numpy(x).to("cuda")


def _jax():
    jax = pytest.importorskip("jax")
    import jax.numpy as xp

    return xp, lambda x: jax.device_put(x.astype(np.int32) if x.dtype == np.int64 else x, jax.devices("gpu")[0])


def _tensorflow():
    tf = pytest.importorskip("tensorflow")
    from xbm.backends.namespaces import tensorflow as xp

    def put(x):
        with tf.device("/GPU:0"):
            return tf.identity(tf.constant(x))

    return xp, put


LIBRARIES = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow}


def host(x):
    """Return an array as a NumPy array."""
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)
