"""The weight of the memory in PyTorch: the core's options, and their state in checkpoints."""

import copy

import pytest
import torch

from xbm import compensation
from xbm.integrations.torch import XBM

OPTIONS = {"warmup": 1, "settle": 1.0, "ramp": 4, "balance": 0.5, "max_age": 3, "half_life": 2.0}


def call(module, step):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 0.1 * torch.randn(8, 3, generator=rng)
    return module(x, torch.arange(8) % 3, ids=torch.arange(8))


def test_the_module_is_the_core_and_resumes():
    """Also in evaluation; `clear` keeps the settled state."""
    module = XBM(3, 32, **OPTIONS)
    state, motion = module._state(), compensation.init(module._state())
    state = state._replace(**{name: one.clone() for name, one in state._asdict().items()})
    for step in range(3):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        x = x + 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        expected = module.objective.step(state, x, torch.arange(8) % 3, ids=torch.arange(8), motion=motion)
        state, motion = expected.state, expected.motion
        assert call(module, step).item() == expected.loss.item()
    assert module.motion_settled == 2
    resumed = XBM(3, 32, **OPTIONS)
    resumed.load_state_dict(module.state_dict())
    for one in (module.eval(), resumed.eval()):
        with torch.no_grad():
            plain = XBM(3, 32, warmup=1, weight=0.0, max_age=3).eval()
            assert call(one, 3) != call(plain, 3)
    assert [call(module.train(), step).item() for step in range(3, 6)] == [
        call(resumed.train(), step).item() for step in range(3, 6)
    ]
    module.clear()
    assert module.motion_settled == 4
    with pytest.raises(ValueError, match="step wants their ids"):
        module(torch.ones(2, 3), torch.arange(2))


def test_a_copy_that_has_not_begun_has_not_settled():
    module = XBM(3, 32, **(OPTIONS | {"settle": 1e9}))
    for step in range(3):
        call(module, step)
    twin, plain = copy.deepcopy(module).eval(), XBM(3, 32, weight=0.0).eval()
    assert module.motion_settled > 0
    assert call(twin, 3) == call(plain, 3) != call(module.eval(), 3)
    call(twin.train(), 3)
    assert twin.motion_settled == 0


def test_the_options_are_shown_and_compared_between_ranks():
    shown, plain = str(XBM(3, 32, **OPTIONS)), XBM(3, 32, warmup=1)
    for name, value in OPTIONS.items():
        assert f"{name}={value}" in shown
        assert name == "warmup" or f"{name}=" not in str(plain)
        assert XBM(3, 32, **({"warmup": 1} | {name: value * 2}))._options() != plain._options()
