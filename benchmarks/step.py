"""A whole training step, forward and backward, as a multiple of the two matrix products that every dense step needs."""

from benchmarks import machine
from benchmarks.contenders import PRODUCTS, STEPS, line_up
from benchmarks.data import MARGIN, Case
from benchmarks.tables import Table, both, span
from benchmarks.timing import interleaved


def run(options):
    """Return the table of every memory size and share of active negatives."""
    others = [name for name in STEPS if name != PRODUCTS]
    table = Table(
        f"A step with {options.loss} loss, B = {options.batch}, D = {options.dim}: multiples of X V^T and W V",
        ("M", "active", "products", *others),
        f"Fastest (median) of {options.rounds} interleaved rounds, as multiples of the products' fastest (median). "
        f"Active: measured share of negatives with S > {MARGIN}. The memory is full; every call stores its batch. xbm "
        "and dense autograd agree in loss and gradient and include an in-batch term; pytorch-metric-learning has none.",
    )
    for capacity in options.sizes:
        for active in options.active:
            case = Case(capacity, active, options.batch, options.dim, options.loss, options.device)
            _add(table, case, others, options)
    return table


def _add(table, case, others, options):
    ready, reasons = line_up(case, limit=options.limit)
    share = case.measured_active()
    figures = {"M": case.capacity, "aimed_active": case.active, "active": share, "left_out": reasons}
    cells = {name: f"- ({reason})" for name, reason in reasons.items()}
    if PRODUCTS in ready:
        found = interleaved(
            ready, lambda n: case.inputs(n + 2), rounds=options.rounds, wait=machine.waiting(case.device)
        )
        figures |= {name: times._asdict() for name, times in found.items()}
        unit = found[PRODUCTS]
        cells |= {name: both(times.times(unit)) for name, times in found.items()}
        cells[PRODUCTS] = f"{span(unit.fastest)} ({span(unit.median)})"
    else:
        cells |= {name: "- (nothing to compare with)" for name in ready}
    table.add(figures, f"{case.capacity:,}", f"{share:.1%}", *(cells[name] for name in (PRODUCTS, *others)))
