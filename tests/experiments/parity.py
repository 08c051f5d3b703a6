"""Helpers to compare a small training with PyTorch and with another framework, from the same weights."""

import subprocess
import sys
from dataclasses import replace

import torch

from xbm.experiments.pictures import load
from xbm.experiments.plan import Plan
from xbm.experiments.training import Training

PLAN = Plan(steps=6, warmup=2, capacity=10, classes=3, instances=2, dim=8, shift=1, evaluate_every=100)


def pair(data, framework, **options):
    """Return a PyTorch training and a training with `framework`, of the same plan on the same pictures."""
    plan, pictures = replace(PLAN, **options), load(data)
    parts = pictures.of(pictures.names[:8]), pictures.of(pictures.names[8:])
    return Training(plan, *parts), Training(plan, *parts, framework)


def losses(training, until=None):
    """Run a training, at most until step `until`, and return the loss of each step."""
    found, fit = [], training.engine.fit
    training.engine.fit = lambda batches, after: fit(batches, lambda loss: found.append(loss) or after(loss))
    training.run(lambda step: step == until)
    training.engine.fit = fit
    return found


def channels_last(encoder):
    """Yield the weights of each layer of PyTorch's "conv" network as NumPy arrays, in channels-last layout."""
    height, width = 0, 0

    def note(layer, given):
        nonlocal height, width
        height, width = given[0].shape[2:]

    flatten = next(layer for layer in encoder if isinstance(layer, torch.nn.Flatten))
    hook = flatten.register_forward_pre_hook(note)
    encoder.eval()(torch.zeros(1, encoder[0].in_channels, 12, 12))
    encoder.train()
    hook.remove()
    for layer in encoder:
        weights = [weight.detach().numpy().copy() for weight in layer.parameters()]
        if isinstance(layer, torch.nn.Conv2d):
            yield [weights[0].transpose(2, 3, 1, 0)]
        elif isinstance(layer, torch.nn.Linear):
            kernel = weights[0].reshape(len(weights[0]), -1, height, width).transpose(2, 3, 1, 0)
            yield [kernel.reshape(-1, kernel.shape[-1]), weights[1]]
        elif weights:
            yield weights


def demo_without(package, framework, out):
    """Run a short demo in a new process in which a package cannot be imported."""
    program = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from xbm.experiments.cli import main
main(["demo", "--quick", "--steps", "12", "--framework", sys.argv[2], "--out", sys.argv[3]])
"""
    run = [sys.executable, "-c", program, package, framework, str(out)]
    return subprocess.run(run, capture_output=True, text=True, check=False)
