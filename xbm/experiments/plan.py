"""What a training run does, as plain values that can be written down and read back."""

from dataclasses import dataclass, replace

from xbm.compensation import Compensation

FRAMEWORKS = ("torch", "keras", "jax")  # of the demo
NETWORKS = ("conv", "resnet")
CONV = ((32, 2), (32, 2), (64, 2), (64, 1))  # channels and stride of each block of "conv"
PRECISIONS = ("float32", "bfloat16", "float16")
PARTS = ("train", "validation", "test")  # of the classes
CURVE_POINTS = 10  # measurements of recall over a run, unless told otherwise
PROBE_POINTS = 50  # readings of the slow drift over a run, about


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides a training run's numbers, beside its pictures and the machine."""

    network: str = "conv"
    dim: int = 64
    loss: str = "contrastive"
    miner: str | None = None
    reduction: str | None = None  # the loss's own
    capacity: int = 8192
    warmup: int = 300
    weight: float = 1.0  # of the memory term; 0 trains without a memory
    follow: bool = False  # whether the memory is shifted after each batch's mean
    probes: int = 0  # rows of the memory that are embedded anew every so many steps, to move it by what they tell
    every: int = 8
    classes: int = 4  # P, classes in a batch
    instances: int = 4  # K, pictures of each
    steps: int = 2500
    learning_rate: float = 2e-3
    shift: int = 0  # pixels at most that a picture is moved at random, either way
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    evaluate_every: int = 250  # steps; also at the start and at the end

    @property
    def compensation(self):
        """How the memory follows the network; None if it does not."""
        if not self.weight or not (self.follow or self.probes):
            return None
        return Compensation(follow=self.follow, probes=self.probes, every=self.every)

    @property
    def probe_every(self):
        """Steps between two readings of the slow drift, a multiple of 10."""
        return max(10, self.steps // PROBE_POINTS // 10 * 10)


@dataclass(frozen=True, kw_only=True)
class Config(Plan):
    """A run on the user's own pictures: its plan, where they come from, and how it is kept."""

    data: str
    classes: int = 8
    steps: int = 2000
    size: int | None = None  # pixels; None takes the pictures as they are
    split_by: str | None = None
    split_seed: int = 0
    checkpoint_every: int = 500
    threads: int = 1


FULL = Plan()
QUICK = replace(FULL, steps=60, capacity=256, warmup=15, evaluate_every=20)


def plan_of(*, seed, steps, quick):
    """Return the demo's plan for its options."""
    plan = QUICK if quick else FULL
    steps = steps or plan.steps
    points = plan.steps // plan.evaluate_every
    return replace(
        plan, seed=seed, steps=steps, warmup=warmup_of(steps, plan.warmup), evaluate_every=-(-steps // points)
    )


def warmup_of(steps, most=FULL.warmup):
    """Return the warm-up of a run that names none: a quarter of its steps at most."""
    return min(most, steps // 4)
