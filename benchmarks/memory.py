"""Peak memory of a step beyond the stored rows, measured in a fresh process per case.

Run as a program, this module is that process: it takes arguments as JSON and prints the bytes.
"""

import json
import sys
from dataclasses import asdict, replace

from benchmarks import machine
from benchmarks.contenders import PRODUCTS, STEPS, left_out
from benchmarks.data import Case
from benchmarks.tables import Table, megabytes


def run(options):
    """Return the table of every memory size and share of active negatives."""
    names = [name for name in STEPS if name != PRODUCTS]
    table = Table(
        f"Peak extra memory of a step with {options.loss} loss, B = {options.peak_batch}, D = {options.dim}",
        ("M", "active", "the rows themselves", *names),
        "Peak use during two steps minus the use before them, with a full memory, after a small step for loading. Each "
        "case runs in its own process.",
    )
    for capacity in options.peak_sizes:
        for active in options.active:
            case = Case(capacity, active, options.peak_batch, options.dim, options.loss, options.device)
            figures, cells = {"M": capacity, "aimed_active": active}, []
            for name in names:
                figures[name] = left_out(name, case) or machine.apart(
                    "benchmarks.memory", options.threads, name=name, case=asdict(case)
                )
                cells.append(megabytes(figures[name]))
            rows = capacity * case.dim * 4
            table.add(figures, f"{capacity:,}", f"{active:.0%}", megabytes(rows), *cells)
    return table


def extra(name, case):
    """Return the peak bytes of two steps of a contender beyond the use before them."""
    small = replace(case, capacity=256)
    STEPS[name](small)(*small.inputs(0))
    contender = STEPS[name](case)
    before = machine.resident(case.device)
    for number in range(2):
        contender(*case.inputs(number))
    return machine.highest(case.device) - before


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    machine.use_threads(arguments["threads"])
    print(extra(arguments["name"], Case(**arguments["case"])))
