"""One training run of the demo: the same network, batches and steps, with or without a memory."""

import time

import torch

from xbm import metrics
from xbm.experiments.networks import conv_net
from xbm.experiments.report import SHOWN, Run
from xbm.integrations.torch import XBM
from xbm.objective import REPORT
from xbm.sampling import PKSampler

READ_EVERY = 10  # steps between two readings of the figures
EMBED_ROWS = 1024  # pictures embedded at a time


def train(plan, train_set, test_set, *, memory, on_step=None):
    """Train from scratch, measuring retrieval on the test classes on the way.

    Parameters
    ----------
    plan : Plan
    train_set, test_set : Glyphs
        Of disjoint classes.
    memory : bool
        Whether to train with the memory of the plan, or in-batch only.
    on_step : callable, optional
        Called with (step, figures: dict of name to float) whenever the figures were read.

    Returns
    -------
    Run
    """
    torch.manual_seed(plan.seed)
    encoder = conv_net(plan.dim)
    xbm = XBM(plan.dim, plan.capacity, warmup=plan.warmup) if memory else XBM(plan.dim, 1, weight=0.0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=plan.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    sampler = PKSampler(
        train_set.labels, classes=plan.classes, instances=plan.instances, seed=plan.seed, batches=plan.steps
    )
    pictures, labels = as_input(train_set.images), torch.from_numpy(train_set.labels)
    evaluate_at = {round(plan.steps * n / plan.evaluations) for n in range(1, plan.evaluations + 1)}

    embeddings, found = retrieval(encoder, test_set)
    recall_steps, recall = [0], [found.recall[1]]
    figures_steps, figures = [], {name: [] for name in REPORT}
    seconds = 0.0
    for step, rows in enumerate(sampler, start=1):
        started = time.perf_counter()
        ids = torch.tensor(rows)
        loss = xbm(encoder(pictures[ids]), labels[ids], ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step > 1:  # in the first, libraries load
            seconds += time.perf_counter() - started
        if step % READ_EVERY == 0 or step == plan.steps:
            now = dict(xbm.report)
            figures_steps.append(step)
            for name, values in figures.items():
                values.append(now[name])
            if on_step:
                on_step(step, now)
        if step in evaluate_at:
            embeddings, found = retrieval(encoder, test_set)
            recall_steps.append(step)
            recall.append(found.recall[1])

    return Run(
        name=f"memory of {plan.capacity:,} rows" if memory else "in-batch only",
        recall_steps=recall_steps,
        recall=recall,
        figures_steps=figures_steps,
        figures=figures if memory else {"batch_loss": figures["batch_loss"]},
        recall_at_1=found.recall[1],
        r_precision=found.r_precision,
        map_at_r=found.map_at_r,
        seconds=seconds,
        memory_megabytes=sum(buffer.nbytes for buffer in xbm.buffers()) / 1e6 if memory else 0.0,
        neighbours=metrics.neighbours(embeddings, k=SHOWN).numpy(),
    )


def as_input(images):
    """Return pictures (n, 28, 28) uint8 as the network takes them: (n, 1, 28, 28) float32 in [0, 1]."""
    return torch.from_numpy(images)[:, None].float() / 255


def embed(encoder, glyphs):
    """Return the embeddings (n, D) of a set of glyphs, in evaluation mode."""
    encoder.eval()
    with torch.no_grad():
        rows = [encoder(as_input(glyphs.images[i : i + EMBED_ROWS])) for i in range(0, len(glyphs.images), EMBED_ROWS)]
    encoder.train()
    return torch.cat(rows)


def retrieval(encoder, glyphs):
    """Return an encoder's embeddings of a set of glyphs, and the retrieval metrics among them."""
    embeddings = embed(encoder, glyphs)
    return embeddings, metrics.retrieval(embeddings, torch.from_numpy(glyphs.labels))
