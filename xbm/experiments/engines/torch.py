"""PyTorch: the encoder under autocast, Adam, and a state that can be saved and loaded."""

import torch

from xbm.experiments import ranks
from xbm.experiments.engines import Stepwise, cpu
from xbm.experiments.networks import BUILDERS
from xbm.experiments.retrieval import blocks
from xbm.integrations.torch import XBM


def one_thread():
    """Use one CPU thread."""
    cpu.one_thread("torch")


def versions():
    """Return {package: version}."""
    return {"torch": torch.__version__}


class Engine(Stepwise):
    """The plan's network, optimiser and memory; interface in `xbm.experiments.engines`.

    The initial weights depend on the seed alone; PyTorch's global random state is left unchanged. Training steps call
    the encoder through `forward`, which may be its DDP wrapper. `options` are more options of the `XBM`.
    """

    def __init__(self, plan, images, **options):
        shape = images.shape[1:]
        self.device = torch.device(plan.device)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(plan.seed)
            encoder = BUILDERS[plan.network](plan.dim, shape)
        self.encoder = self.forward = encoder.to(self.device)
        memory = {"capacity": plan.capacity, "warmup": plan.warmup} if plan.weight else {"capacity": 1}
        probes = plan.compensation is not None and plan.compensation.probes

        def embed(ids):
            with self.autocast:
                return self.encoder(as_input(images[ids.numpy()], self.device))

        self.xbm = XBM(
            plan.dim,
            compensate=plan.compensation,
            embed=embed if probes else None,
            loss=plan.loss,
            miner=plan.miner,
            reduction=plan.reduction,
            weight=plan.weight,
            device=self.device,
            **memory,
            **options,
        )
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.xbm.parameters()], lr=plan.learning_rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.precision == "float16")
        self.autocast = torch.autocast(
            self.device.type, getattr(torch, plan.precision), enabled=plan.precision != "float32"
        )

    @property
    def memory_bytes(self):
        """Size of the memory in bytes."""
        return sum(buffer.nbytes for buffer in self.xbm.buffers())

    def step(self, images, labels, ids, rate):
        """Take one step with learning rate `rate` on this rank's part of the batch; return the loss before it."""
        images, labels, ids = (ranks.part(one) for one in (images, labels, ids))
        labels, ids = (torch.from_numpy(one).to(self.device) for one in (labels, ids))
        with self.autocast:
            embeddings = self.forward(as_input(images, self.device))
        loss = self.xbm(embeddings, labels, ids=ids)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def embed(self, images):
        """Return the embeddings (n, D) of pictures (n, C, H, W) uint8."""
        return embed(self.encoder, images, self.device)

    def figures(self):
        """Return the figures of the last step, as {name: float}."""
        return dict(self.xbm.report)

    def state(self):
        """Return the state to resume from: named tensors, and JSON-serializable values."""
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        tensors |= {f"xbm.{name}": value for name, value in self.xbm.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
        return tensors, {"scaler": self.scaler.state_dict()}

    def load(self, tensors, values):
        """Load a state of the same plan."""
        self.encoder.load_state_dict(below("encoder", tensors))
        self.xbm.load_state_dict(below("xbm", tensors))
        moments = {}
        for name, value in below("optimizer", tensors).items():
            i, _, which = name.partition(".")
            moments.setdefault(int(i), {})[which] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])


def as_input(images, device):
    """Convert pictures (n, C, H, W) uint8 to the networks' input, float32 in [0, 1] on a device."""
    # Force contiguous strides: NumPy's differ with one channel, which changes the last bits of the convolution.
    return torch.from_numpy(images).to(device, torch.float32, memory_format=torch.contiguous_format) / 255


def embed(encoder, images, device):
    """Return the embeddings (n, D) of pictures (n, C, H, W) uint8, in float32 and in evaluation mode.

    The encoder's training mode is restored afterwards.
    """
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            return torch.cat([encoder(as_input(block, device)) for block in blocks(images)])
    finally:
        encoder.train(training)


def below(part, tensors):
    """Return the tensors whose names begin with `part` and a dot, without that prefix."""
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
