"""When the memory term counts, under PyTorch: the core's schedule, which resumes with the module."""

import copy

import pytest
import torch

from xbm import Compensation
from xbm.integrations.torch import XBM
from xbm.integrations.torch.agreement import checksum
from xbm.state import from_named, named

OPTIONS = {"warmup": 1, "settle": 1.0, "ramp": 4}


def call(module, step):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 0.1 * torch.randn(8, 3, generator=rng)
    return module(x, torch.arange(8) % 3, ids=torch.arange(8))


def test_the_module_is_the_core_and_resumes():
    """Also where it is evaluated; `clear` leaves a memory that has settled settled."""
    module = XBM(3, 32, **OPTIONS)
    state = from_named({name: one.clone() for name, one in named(module._state()).items()})
    for step in range(3):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        x = x + 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        expected = module.objective.step(state, x, torch.arange(8) % 3, ids=torch.arange(8))
        state = expected.state
        assert call(module, step).item() == expected.loss.item()
    assert module.warmup_counted == 2
    resumed = XBM(3, 32, **OPTIONS)
    resumed.load_state_dict(module.state_dict())
    for one in (module.eval(), resumed.eval()):
        with torch.no_grad():
            plain = XBM(3, 32, warmup=1, weight=0.0).eval()
            assert call(one, 3) != call(plain, 3)
    assert [call(module.train(), step).item() for step in range(3, 6)] == [
        call(resumed.train(), step).item() for step in range(3, 6)
    ]
    module.clear()
    assert module.warmup_counted == 4
    with pytest.raises(ValueError, match=r"settle= .* pass their ids to each training call"):
        module(torch.ones(2, 3), torch.arange(2))


def test_a_copy_that_has_not_begun_has_not_settled():
    module = XBM(3, 32, **(OPTIONS | {"settle": 1e9}))
    for step in range(3):
        call(module, step)
    twin, plain = copy.deepcopy(module).eval(), XBM(3, 32, weight=0.0).eval()
    assert module.warmup_counted > 0
    assert call(twin, 3) == call(plain, 3) != call(module.eval(), 3)
    call(twin.train(), 3)
    assert twin.warmup_counted == 0


def test_the_options_are_shown_and_compared_between_ranks():
    shown, plain = str(XBM(3, 32, **OPTIONS)), XBM(3, 32, warmup=1)
    assert "settle=" not in str(plain)
    for name, value in OPTIONS.items():
        assert f"{name}={value}" in shown
        assert f"{name}={value}" not in str(plain) or name == "warmup"
        other = XBM(3, 32, **({"warmup": 1} | {name: value * 2}))
        assert checksum(other.objective, torch.float32) != checksum(plain.objective, torch.float32)


@pytest.mark.parametrize(
    ("options", "prefix", "other"),
    [(OPTIONS, "warmup_", "motion_"), ({"warmup": 1, "compensate": Compensation()}, "motion_", "warmup_")],
    ids=["warm-up", "motion"],
)
def test_one_part_is_saved_and_loaded_without_the_other(options, prefix, other):
    """Into a module with both, too, where the other part begins anew; and a state with both into a module with one."""
    module, both = XBM(3, 32, **options), XBM(3, 32, **OPTIONS, compensate=Compensation())
    for step in range(3):
        call(module, step)
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    assert [name for name in saved if name.startswith(prefix)]
    assert not [name for name in saved if name.startswith(other)]
    resumed = XBM(3, 32, **options)
    resumed.load_state_dict(saved)
    fresh = XBM(3, 32, **OPTIONS, compensate=Compensation()).state_dict()
    for step in range(2):
        call(both, step)
    both.load_state_dict(saved)
    for name, value in both.state_dict().items():
        expected = fresh[name] if name.startswith(other) else saved[name]
        assert torch.equal(value.nan_to_num(), expected.nan_to_num()), name
    again = XBM(3, 32, **options)
    again.load_state_dict(both.state_dict())
    wanted = [call(module, step).item() for step in range(3, 6)]
    for one in (resumed, again):
        assert [call(one, step).item() for step in range(3, 6)] == wanted
        assert one.state_dict().keys() == saved.keys()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("counted", torch.zeros(2, dtype=torch.int64), r"warmup_counted must have shape \(\), got \(2,\)"),
        ("drift", torch.zeros(()).to("meta"), "warmup_drift must be a dense tensor with values"),
    ],
)
def test_a_bad_warm_up_is_refused(name, value, sentence):
    module, saved = XBM(3, 32, **OPTIONS), XBM(3, 32, **OPTIONS)
    for step in range(2):
        call(module, step)
    before = {name: one.clone() for name, one in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"The memory is unchanged.* {sentence}"):
        module.load_state_dict(saved.state_dict() | {f"warmup_{name}": value})
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
