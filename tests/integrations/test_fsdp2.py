"""FSDP2: an encoder whose weights are sharded over ranks, next to a memory."""

import pytest
import torch

from tests.processes import shared
from xbm.integrations.torch import XBM

BATCH, STEPS, DIM = 6, 6, 4


@pytest.fixture(scope="module")
def ranks():
    return shared(2)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, DIM))


def batches():
    """Yield the batches of all ranks together."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(BATCH, 5, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def train(encoder, part=slice(None), **options):
    """Take a few steps on a part of each batch; return the losses and the memory."""
    xbm, losses = XBM(DIM, 16, warmup=2, **options), []
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.2, momentum=0.9)
    for x, labels in batches():
        loss = xbm(encoder(x[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), xbm


def train_on_rank(options):
    """Return a rank's losses, the full weights and the memory's labels."""
    from torch.distributed.fsdp import fully_shard

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    encoder = network()
    for layer in (encoder[0], encoder[2], encoder):
        fully_shard(layer)
    part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    losses, xbm = train(encoder, part, **options)
    return losses, {name: value.full_tensor() for name, value in encoder.state_dict().items()}, int(xbm.count)


@pytest.mark.parametrize("options", [{}, {"shard": True}], ids=["replicated", "sharded"])
def test_the_weights_are_those_of_one_process(options, ranks):
    encoder = network()
    expected, xbm = train(encoder)
    for losses, weights, count in ranks.run(train_on_rank, options):
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(weights, dict(encoder.state_dict()))
        assert count == int(xbm.count)
