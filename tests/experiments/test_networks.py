"""The encoders: they accept pictures of any size, and the command line offers all of them."""

import pytest
import torch

from xbm.experiments.networks import BUILDERS, Residual
from xbm.experiments.plan import NETWORKS


def test_the_command_line_offers_them_all():
    assert tuple(BUILDERS) == NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 48), (3, 1, 5), (1, 130, 224)])
def test_pictures_become_embeddings(name, shape):
    encoder = BUILDERS[name](5, shape)
    embeddings = encoder(torch.rand(2, *shape))
    assert embeddings.shape == (2, 5)
    embeddings.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_the_stem_brings_large_pictures_down():
    sides = []
    for side in (28, 56, 57, 224):
        encoder = BUILDERS["resnet"](5, (3, side, 2 * side))
        for block in encoder:
            if isinstance(block, Residual):
                block.register_forward_pre_hook(lambda _, given: sides.append(given[0].shape[2]))
                break
        encoder.eval()(torch.rand(1, 3, side, 2 * side))
    assert sides == [28, 56, 29, 56]


def test_a_residual_block_starts_as_its_shortcut():
    x = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(Residual(4, 4, 1)(x), x)
    assert Residual(4, 8, 2)(x).shape == (2, 8, 3, 3)
