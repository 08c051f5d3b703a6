"""pytorch-metric-learning's losses give the same numbers as ours under its conventions, with more rows than anchors."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers

import xbm
from tests.test_losses import FEWER
from xbm import Block
from xbm.mining import mined

COSINE = distances.CosineSimilarity()
CLASSES = 3

PEERS = {
    "contrastive": (
        xbm.Contrastive(reduction="mean-nonzero"),
        losses.ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=COSINE),
    ),
    "triplet": (
        xbm.Triplet(reduction="mean-nonzero"),
        losses.TripletMarginLoss(margin=0.2, distance=COSINE, triplets_per_anchor="all"),
    ),
    "semi-hard triplet": (
        xbm.SemiHardTriplet(margin=0.5, reduction="mean-nonzero"),
        losses.TripletMarginLoss(margin=0.5, distance=COSINE, triplets_per_anchor="all"),
        miners.TripletMarginMiner(margin=0.5, distance=COSINE, type_of_triplets="semihard"),
    ),
    "batch-hard triplet": (
        xbm.BatchHardTriplet(),
        losses.TripletMarginLoss(margin=0.2, distance=COSINE, reducer=reducers.MeanReducer()),
        miners.BatchHardMiner(distance=COSINE),
    ),
    "multi-similarity": (xbm.MultiSimilarity(), losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)),
    "multi-similarity, mined": (
        mined(xbm.MultiSimilarity(), xbm.MultiSimilarityMiner(epsilon=0.1)),
        losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
        miners.MultiSimilarityMiner(epsilon=0.1),
    ),
    "NT-Xent": (xbm.NTXent(), losses.NTXentLoss(temperature=0.07)),
    "SupCon": (xbm.SupCon(), losses.SupConLoss(temperature=0.1, reducer=reducers.MeanReducer())),
    "NCA": (xbm.NCA(), losses.NCALoss(softmax_scale=10, distance=COSINE)),
    "lifted structure": (
        xbm.LiftedStructure(),
        losses.GeneralizedLiftedStructureLoss(neg_margin=0, pos_margin=1, distance=COSINE),
    ),
    "circle": (xbm.Circle(), losses.CircleLoss(m=0.4, gamma=80, reducer=reducers.MeanReducer())),
    "tuplet margin": (xbm.TupletMargin(), losses.TupletMarginLoss(reducer=reducers.MeanReducer())),
    "margin": (xbm.Margin(reduction="mean-nonzero"), losses.ContrastiveLoss(pos_margin=1.0, neg_margin=1.4)),
}
"""Name: (our loss, their loss, their miner).

All anchors have the same number of positives, so that means over pairs and over anchors agree. There are at least two
anchors, because most of their losses return 0 for one. Their MarginLoss counts a pair once per triplet, so our margin
loss is compared with their ContrastiveLoss, which has the same hinges, d > beta - alpha and d < beta + alpha.
"""


def drawn(seed, anchors, rows_per_class):
    """Return unit `(x, labels, rows, row_labels)`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    row_labels = torch.arange(CLASSES).repeat_interleave(rows_per_class)
    labels = torch.randint(CLASSES, (anchors,), generator=generator)
    x, rows = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (anchors, len(row_labels)))
    return *(torch.nn.functional.normalize(one) for one in (x, rows)), labels, row_labels


@pytest.mark.parametrize("name", PEERS)
@FEWER
@given(seed=st.integers(0, 2**31), anchors=st.integers(2, 6), rows_per_class=st.integers(1, 4))
def test_value_and_gradient_are_theirs(name, seed, anchors, rows_per_class):
    ours, theirs, *miner = PEERS[name]
    x, rows, labels, row_labels = drawn(seed, anchors, rows_per_class)
    x.requires_grad_()
    pairs = miner[0](x, labels, rows, row_labels) if miner else None
    assume(pairs is None or any(len(one) > 1 for one in pairs))  # their losses return 0 for one pair
    expected = theirs(x, labels, pairs, ref_emb=rows, ref_labels=row_labels)
    expected.backward()

    z = x.detach()
    same = labels[:, None] == row_labels[None, :]
    block = Block(z @ rows.T, same.double(), (~same).double(), torch.arange(len(rows)), torch.arange(anchors))
    value, W = ours.whole(block)
    torch.testing.assert_close(value.mean(), expected.detach(), rtol=1e-9, atol=1e-12)
    dz = W @ rows / anchors
    tangent = dz - (dz * z).sum(dim=1, keepdim=True) * z
    torch.testing.assert_close(tangent, x.grad, rtol=1e-7, atol=1e-10)


@FEWER
@given(seed=st.integers(0, 2**31), n=st.integers(2, 4))
def test_smooth_ap_is_theirs_with_the_anchor_among_its_positives(seed, n):
    """Theirs ranks a batch with n samples per class, and includes the anchor among its own positives."""
    labels = torch.arange(n).repeat_interleave(n)
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(len(labels), 4, generator=generator, dtype=torch.float64))
    same = labels[:, None] == labels[None, :]
    order = torch.arange(len(labels))
    value, _ = xbm.SmoothAP().whole(Block(x @ x.T, same.double(), (~same).double(), order, order))
    expected = losses.SmoothAPLoss(temperature=0.01, reducer=reducers.MeanReducer())(x, labels)
    np.testing.assert_allclose(float(value.mean()), float(expected), rtol=1e-6, atol=1e-9)
