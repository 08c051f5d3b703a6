"""Operations for PyTorch: writes in place, attaches closed-form gradients to autograd."""

from contextlib import nullcontext

import torch

from xbm.backends.standard import apply_active_weights, fold

__all__ = [
    "apply_weights",
    "attach_gradient",
    "fold",
    "full_precision",
    "is_compiling",
    "known",
    "stop_gradient",
    "top_k",
    "write_rows",
]


def write_rows(array, slots, rows):
    """Write rows (K, ...) into slots (K,) of a ring (M, ...), K <= M; return the ring."""
    return array.index_copy_(0, slots, rows)


def stop_gradient(x):
    """Return x as a constant for autograd."""
    return x.detach()


def top_k(x, k):
    """Return the k largest of each row of x (B, n) as (values, indices), both (B, k), k <= n.

    In falling order; of equal values the lowest index comes first.
    """
    rows = x.shape[1]
    values, indices = torch.topk(x, min(k + 1, rows), dim=1)
    indices = indices[:, :k]
    # topk may keep any of the values that equal the smallest one kept.
    if k < rows and (tied := values[:, k - 1] == values[:, k]).any():
        indices[tied] = torch.sort(x[tied], dim=1, descending=True, stable=True).indices[:, :k]
    indices = indices.sort(dim=1).values
    values, order = torch.sort(x.gather(1, indices), dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def apply_weights(weights, rows):
    """Return W V: (B, m) pair weights times (m, D) rows.

    On the CPU only the rows of some weight are read where they are few; on a device that would make it wait.
    """
    if weights.device.type == "cpu" and not is_compiling():
        return apply_active_weights(weights, rows)
    return weights @ rows


def full_precision(x):
    """Return a context without autocast on x's device."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def known(x):
    """Return the value of an integer scalar on the host, None on a device or under a compiler."""
    return int(x) if x.device.type == "cpu" and not is_compiling() else None


def is_compiling():
    """Tell whether the call is being traced by torch.compile or torch.export."""
    return torch.compiler.is_compiling()


def attach_gradient(value, *pairs):
    """Return the scalar `value` with a gradient known in closed form for each `(x, gradient)` in `pairs`.

    Nothing but the gradients is saved for backward. They are scaled in their own dtype before they are
    cast to x's, so that a loss scaler's factor rescues what half precision alone would flush to zero.
    """
    return _ClosedForm.apply(value, *(tensor for pair in pairs for tensor in pair))


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, *pairs):
        inputs, gradients = pairs[::2], pairs[1::2]
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled() and not is_compiling():
            raise RuntimeError(
                "XBM knows first derivatives only, in closed form: take its backward without create_graph=True"
            )
        flat = [None]
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            flat += [(upstream * gradient).to(dtype), None]
        return tuple(flat)
