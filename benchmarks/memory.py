"""The most memory that a step needs beyond the rows it is compared with, each in a fresh process.

As a program it is that process: arguments as JSON in, bytes out.
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
        "Highest use during two steps less the use before them, memory full, after a small step has loaded what it "
        "needs; each in a process of its own.",
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
    """Return the most bytes that two steps of a contender need beyond what was there before."""
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
