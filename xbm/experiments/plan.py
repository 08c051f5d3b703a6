"""The configuration of a training run, as plain values that can be saved as JSON."""

from dataclasses import dataclass, replace

from xbm.compensation import Compensation

FRAMEWORKS = ("torch", "keras", "jax")  # supported by the demo
NETWORKS = ("conv", "resnet")
CONV = ((32, 2), (32, 2), (64, 2), (64, 1))  # channels and stride of each block of "conv"
PRECISIONS = ("float32", "bfloat16", "float16")
PARTS = ("train", "validation", "test")  # parts of the class split
CURVE_POINTS = 10  # default number of recall measurements per run
PROBE_POINTS = 50  # approximate number of slow drift measurements per run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that determines the results of a training run, apart from its pictures and the machine."""

    network: str = "conv"
    dim: int = 64
    loss: str = "contrastive"
    miner: str | None = None
    reduction: str | None = None  # None: the loss's default
    capacity: int = 8192
    warmup: int = 300
    weight: float = 1.0  # weight of the memory loss; 0 trains without a memory
    follow: bool = False  # whether the memory is shifted by the motion of the batch mean
    probes: int = 0  # rows of the memory to re-embed every `every` steps; their motion corrects the whole memory
    every: int = 8
    classes: int = 4  # P, classes per batch
    instances: int = 4  # K, pictures per class in a batch
    steps: int = 2500
    learning_rate: float = 2e-3
    shift: int = 0  # maximum random translation of a picture, in pixels, in each direction
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    evaluate_every: int = 250  # steps between recall measurements; there is one at the start and one at the end, too

    @property
    def compensation(self):
        """The memory's `Compensation`; None if it is off."""
        if not self.weight or not (self.follow or self.probes):
            return None
        return Compensation(follow=self.follow, probes=self.probes, every=self.every)

    @property
    def probe_every(self):
        """Steps between two measurements of the slow drift, a multiple of 10."""
        return max(10, self.steps // PROBE_POINTS // 10 * 10)


@dataclass(frozen=True, kw_only=True)
class Config(Plan):
    """The configuration of a run on the user's own pictures: the plan, the data and the checkpoints."""

    data: str
    classes: int = 8
    steps: int = 2000
    size: int | None = None  # side in pixels to resize the pictures to; None keeps their size
    split_by: str | None = None
    split_seed: int = 0
    checkpoint_every: int = 500
    threads: int = 1


FULL = Plan()
QUICK = replace(FULL, steps=60, capacity=256, warmup=15, evaluate_every=20)


def plan_of(*, seed, steps, quick):
    """Return the demo's plan for the given command line options."""
    plan = QUICK if quick else FULL
    steps = steps or plan.steps
    points = plan.steps // plan.evaluate_every
    return replace(
        plan, seed=seed, steps=steps, warmup=warmup_of(steps, plan.warmup), evaluate_every=-(-steps // points)
    )


def warmup_of(steps, most=FULL.warmup):
    """Return the default warm-up of a run: `most`, but at most a quarter of the steps."""
    return min(most, steps // 4)
