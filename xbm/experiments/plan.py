"""What a comparison runs."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """What two runs have in common, and the memory that one of them has."""

    seed: int = 0
    steps: int = 2500
    classes: int = 4  # P, classes in a batch
    instances: int = 4  # K, pictures of each
    dim: int = 64
    capacity: int = 8192
    warmup: int = 300
    learning_rate: float = 2e-3
    evaluations: int = 10  # over the run, beside the one at its start


FULL = Plan()
QUICK = Plan(steps=60, capacity=256, warmup=15, evaluations=3)


def plan_of(*, seed, steps, quick):
    """Return the plan for the command's options; the warm-up is at most a quarter of the steps."""
    plan = QUICK if quick else FULL
    steps = steps or plan.steps
    return replace(plan, seed=seed, steps=steps, warmup=min(plan.warmup, steps // 4))
