"""Every loss and every miner: cost of a step, numerical error, and lines of code."""

import ast
import inspect
import textwrap

import torch

from benchmarks import formulas, machine
from benchmarks.contenders import PRODUCTS, Ours, Products
from benchmarks.data import Case
from benchmarks.tables import Table, both, span
from benchmarks.timing import clocked, interleaved
from xbm import Block, DistanceWeightedMiner, losses, mining

ACTIVE = 0.1  # share of negatives above the contrastive loss's margin
SMALL = (16, 512, 64)  # numbers of anchors, rows and classes for measuring errors
SMALLER = (16, 96, 12)  # the same for losses whose formula compares rows with rows


def run(options):
    """Return the table of every loss, and of the contrastive loss with every miner."""
    table = Table(
        f"Every loss and miner, B = {options.batch}, D = {options.dim}, {options.classes:,} classes",
        ("loss", "M", "products", "step", "seconds", "error, float64", "error, float32", "lines"),
        "Step: forward and backward of xbm with the in-batch term, as a multiple of X V^T and W V; fastest (median) of "
        f"{options.rounds} interleaved rounds, {ACTIVE:.0%} of the negatives above 0.5. Seconds: the fastest step. "
        "Errors: largest error of values and weights relative to the largest value and weight, compared with the dense "
        "formula and autograd. Lines: code of the class without base classes, docstrings, comments and blank lines.",
    )
    miners = {**mining.MINERS, "distance-weighted": lambda: DistanceWeightedMiner(dim=options.dim)}
    for capacity in options.sizes:
        for name in losses.LOSSES:
            _add(table, name, options, capacity, loss=name)
        for name, make in miners.items():
            _add(table, f"contrastive, {name} miner", options, capacity, miner=make())
    return table


def _add(table, title, options, capacity, *, loss="contrastive", miner=None):
    case = Case(capacity, ACTIVE, options.batch, options.dim, loss, options.device, options.classes)
    ready = {PRODUCTS: Products(case), title: Ours(case, miner=miner)}
    wait = machine.waiting(case.device)
    for one in ready.values():
        clocked(one, case.inputs(0), wait=wait)
    found = interleaved(ready, lambda n: case.inputs(n + 1), rounds=options.rounds, wait=wait)
    figures = {"loss": title, "M": capacity} | {name: times._asdict() for name, times in found.items()}
    cells = [span(found[PRODUCTS].fastest), both(found[title].times(found[PRODUCTS])), span(found[title].fastest)]
    if miner is None:
        figures["errors"] = [error(loss, dtype) for dtype in (torch.float64, torch.float32)]
        of = type(losses.get(loss))
        cells += [f"{one:.0e}" for one in figures["errors"]]
    else:
        cells += ["", ""]
        of = type(miner)
    figures["lines"] = lines(of)
    table.add(figures, title, f"{capacity:,}", *cells, str(figures["lines"]))


def error(name, dtype, *, seed=0):
    """Return the largest relative error of a loss on random unit vectors; see `difference`."""
    anchors, rows, classes = SMALLER if name in formulas.BY_THREE else SMALL
    generator = torch.Generator().manual_seed(seed)
    x, V = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64))
        for n in (anchors, rows)
    )
    labels, row_labels = (torch.randint(classes, (n,), generator=generator) for n in (anchors, rows))
    P = labels[:, None] == row_labels
    return difference(name, (x @ V.T).to(dtype), P, ~P)


def difference(name, S, P, N):
    """Return the largest relative error of a loss's values and weights against its formula and autograd in float64.

    S (B, M) are the similarities, P and N (B, M) booleans.
    """
    loss, (B, M) = losses.get(name), S.shape
    value, W = loss.whole(Block(S, P.to(S.dtype), N.to(S.dtype), torch.arange(M), torch.arange(B)))
    leaf = S.double().requires_grad_()
    expected = formulas.LOSSES[name](leaf, P, N, loss)
    (weights,) = torch.autograd.grad(expected.sum(), leaf)
    pairs = ((value, expected.detach()), (W, weights))
    errors = [(found - wanted).abs().max() / wanted.abs().max() for found, wanted in pairs]
    return float(torch.stack(errors).max())  # unlike Python's max, this propagates NaN


def lines(kind):
    """Return the number of lines of code of a class, without docstrings, comments and blank lines."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return len(ast.unparse(tree).replace("\n\n", "\n").splitlines())
