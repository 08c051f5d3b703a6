"""Pictures to embeddings, embeddings to retrieval metrics, and `xbm eval`, which does both with a run's encoder."""

import rich.table
import torch

from xbm import metrics
from xbm.experiments import checkpoint, pictures
from xbm.experiments.errors import DivergenceError, InputError
from xbm.experiments.networks import BUILDERS

EMBED_ELEMENTS = 1024 * 28 * 28  # of the pictures embedded at a time, unless that leaves fewer than EMBED_ROWS
EMBED_ROWS = 16


def as_input(images, device):
    """Return pictures (n, C, H, W) uint8 as networks take them: float32 in [0, 1], on a device."""
    # Strides as of a new array: NumPy's are others where there is one channel, and the convolution's last bits follow.
    return torch.from_numpy(images).to(device, torch.float32, memory_format=torch.contiguous_format) / 255


def embed(encoder, images, device):
    """Return the embeddings (n, D) of pictures (n, C, H, W) uint8, in float32 and in evaluation mode.

    The encoder is left in the mode it was in.

    Raises
    ------
    DivergenceError
        If one is not finite.
    """
    rows = max(EMBED_ROWS, EMBED_ELEMENTS // images[0].size)
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            blocks = [encoder(as_input(images[i : i + rows], device)) for i in range(0, len(images), rows)]
    finally:
        encoder.train(training)
    embeddings = torch.cat(blocks)
    if not torch.isfinite(embeddings).all():
        raise DivergenceError("the network's embeddings are not finite")
    return embeddings


def retrieval(embeddings, labels, k=(1,)):
    """Return the retrieval metrics of a set against itself: embeddings (n, D) of torch, labels (n,) of NumPy."""
    return metrics.retrieval(embeddings, torch.from_numpy(labels).to(embeddings.device), k=k)


def evaluate(file, data, *, size, part, k, device, threads, console):
    """Measure the encoder of a checkpoint on pictures and print the metrics.

    Parameters
    ----------
    file : Path
        The checkpoint.
    data : path
        As for `pictures.load`.
    size : int or None
        Side to resize the pictures to; None does as the run did.
    part : {"train", "validation", "test", "all"} or None
        Of the run's own classes; None takes the test classes of the run's own pictures, and all of any others.
    k : sequence of int
        The K of R@K.
    device : str
    threads : int or None
    console : rich.console.Console

    Raises
    ------
    InputError
        If there is nothing to measure.
    """
    prefix = "encoder."
    tensors, values = checkpoint.read(file, prefix)
    with checkpoint.sound(file):
        config, known, step = values["config"], values["data"], int(values["step"])
        network, dim, run_size = (config[name] for name in ("network", "dim", "size"))
        own_print, classes, (_, *shape) = (known[name] for name in ("fingerprint", "classes", "shape"))
        encoder = BUILDERS[network](dim, shape)
        encoder.load_state_dict({name.removeprefix(prefix): value for name, value in tensors.items()})
    with console.status("Reading the pictures"):
        chosen = pictures.load(data, size=size or run_size)
    own = chosen.fingerprint() == own_print
    if part in classes and not own:
        raise InputError(f"{data} holds other pictures than the run, so it has no {part} classes: leave out --classes")
    if list(chosen.images.shape[1:]) != shape:
        expected, came = ("{2} x {1} in {0} channels".format(*one) for one in (shape, chosen.images.shape[1:]))
        mend = ": --size resizes them" if chosen.images.shape[1] == shape[0] else ""
        raise InputError(f"the run's pictures are {expected}, those in {data} are {came}{mend}")
    part = part or ("test" if own else "all")
    if part != "all":
        with checkpoint.sound(file):
            chosen = chosen.of(classes[part])
    if threads:
        torch.set_num_threads(threads)
    device = device_of(device)
    with console.status("Embedding"):
        found = retrieval(embed(encoder.to(device), chosen.images, device), chosen.labels, k)
    console.print(table(chosen, found, f"{part} classes, encoder after step {step:,}"))


def table(chosen, found, title):
    """Return the metrics of some pictures as a table."""
    figures = {f"R@{k}": value for k, value in found.recall.items()}
    figures |= {"R-Precision": found.r_precision, "MAP@R": found.map_at_r}
    result = rich.table.Table(title=title)
    for column in ("classes", "pictures", *figures):
        result.add_column(column, justify="right")
    counts = (f"{len(one):,}" for one in (chosen.names, chosen.labels))
    result.add_row(*counts, *(f"{value:.3f}" for value in figures.values()))
    return result


def device_of(name):
    """Return a torch device that is there, or refuse its name."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"there is no device {name!r} here") from error
    return torch.device(name)
