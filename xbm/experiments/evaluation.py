"""`xbm eval`: the retrieval metrics of a run's encoder on pictures."""

import torch

from xbm.experiments import checkpoint, pictures
from xbm.experiments.engines.torch import embed
from xbm.experiments.errors import InputError
from xbm.experiments.networks import BUILDERS
from xbm.experiments.retrieval import finite, retrieval, table


def evaluate(file, data, *, size, part, k, device, threads, console):
    """Measure the encoder of a checkpoint on pictures and print the metrics.

    Parameters
    ----------
    file : Path
        The checkpoint.
    data : path
        As for `pictures.load`.
    size : int or None
        Side in pixels to resize the pictures to; None uses the run's size.
    part : {"train", "validation", "test", "all"} or None
        Classes to measure. None measures the test classes if these are the run's own pictures, else all classes.
    k : sequence of int
        The k of R@k.
    device : str
        A PyTorch device.
    threads : int or None
        CPU threads; None keeps PyTorch's default.
    console : rich.console.Console

    Raises
    ------
    InputError
        If the checkpoint, the pictures or the device cannot be used.
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
        raise InputError(f"{data} does not hold the run's pictures, so it has no {part} classes: omit --classes")
    if list(chosen.images.shape[1:]) != shape:
        expected, came = ("{2} x {1} pixels, {0} channels".format(*one) for one in (shape, chosen.images.shape[1:]))
        mend = ": resize them with --size" if chosen.images.shape[1] == shape[0] else ""
        raise InputError(f"expected pictures of {expected}, as in the run, got {came} in {data}{mend}")
    part = part or ("test" if own else "all")
    if part != "all":
        with checkpoint.sound(file):
            chosen = chosen.of(classes[part])
    if threads:
        torch.set_num_threads(threads)
    device = device_of(device)
    with console.status("Embedding"):
        found = retrieval(finite(embed(encoder.to(device), chosen.images, device)), chosen.labels, k)
    console.print(table(chosen, found, f"{part} classes, encoder after step {step:,}"))


def device_of(name):
    """Return a torch device; raise an error if it is not available."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not available on this machine") from error
    return torch.device(name)
