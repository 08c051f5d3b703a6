"""Straightforward implementations of every loss over the whole (B, M) array of similarities, for autograd.

Each function takes the similarities S and the booleans P and N of positive and negative pairs, all (B, M), and the loss
object for its constants, and returns (B,). The code is independent of the library's closed-form gradients.
"""

from math import radians

import torch


def contrastive(S, P, N, loss):
    """Return the mean hinge over positives plus the mean hinge over active negatives."""
    return _hinges((loss.pos_margin - S).clamp(min=0) * P, (S - loss.neg_margin).clamp(min=0) * N, P)


def margin(S, P, N, loss):
    """Return the mean hinge of the distances of positives plus that of negatives, around the boundary beta."""
    d = (2 - 2 * S).clamp(min=1e-6).sqrt()
    return _hinges((loss.alpha + d - loss.beta).clamp(min=0) * P, (loss.alpha - d + loss.beta).clamp(min=0) * N, P)


def binomial_deviance(S, P, N, loss):
    """Return the mean softplus over positives plus the mean softplus over negatives."""
    pull, push = softplus(-loss.alpha * (S - loss.base)), softplus(loss.beta * (S - loss.base))
    return _mean(pull, P) + _mean(push, N)


def multi_similarity(S, P, N, loss):
    """Return the soft maximum over the least similar positives plus that over the most similar negatives."""
    above = S - loss.base
    pull, push = _log_sum(-loss.alpha * above, P), _log_sum(loss.beta * above, N)
    return softplus(pull) / loss.alpha + softplus(push) / loss.beta


def triplet(S, P, N, loss):
    """Return the mean over the triplets with a positive loss."""
    return _triplets(S, P, N, loss.margin, torch.ones_like)


def semi_hard_triplet(S, P, N, loss):
    """Return the mean over the triplets with a positive loss whose negative is less similar than the positive."""
    return _triplets(S, P, N, loss.margin, lambda gap: gap < 0)


def batch_hard_triplet(S, P, N, loss):
    """Return the hinge of the hardest triplet."""
    hardest = S.masked_fill(~N, -torch.inf).amax(dim=1) - S.masked_fill(~P, torch.inf).amin(dim=1)
    return (hardest + loss.margin).clamp(min=0)


def lifted_structure(S, P, N, loss):
    """Return the hinge of the sum of two log-sum-exps."""
    pull, push = _log_sum(loss.gamma * (loss.pos_margin - S), P), _log_sum(loss.gamma * (S - loss.neg_margin), N)
    return (pull + push).clamp(min=0) / loss.gamma


def nt_xent(S, P, N, loss):
    """Return the mean over positives of the cross entropy of each positive against all negatives."""
    logits = S / loss.temperature
    return _mean(softplus(_log_sum(logits, N)[:, None] - logits), P)


def tuplet_margin(S, P, N, loss):
    """Return `nt_xent` with the angle of each positive reduced by the margin."""
    eased = torch.cos(torch.acos(S.clamp(-1 + 1e-6, 1 - 1e-6)) - radians(loss.margin))
    return _mean(softplus(_log_sum(loss.scale * S, N)[:, None] - loss.scale * eased), P)


def supcon(S, P, N, loss):
    """Return the log-sum-exp over all pairs minus the mean over positives."""
    logits = S / loss.temperature
    return torch.where(P.any(dim=1), _log_sum(logits, P | N) - _mean(logits, P), 0.0)


def nca(S, P, N, loss):
    """Return the log-sum-exp over all pairs minus the log-sum-exp over positives."""
    logits = S / loss.temperature
    some = P.any(dim=1)
    return torch.where(some, _log_sum(logits, P | N) - torch.where(some, _log_sum(logits, P), 0.0), 0.0)


def circle(S, P, N, loss):
    """Return the softplus of the sum of two log-sum-exps, with a detached weight per pair."""
    a_p, a_n = (1 + loss.margin - S).clamp(min=0).detach(), (S + loss.margin).clamp(min=0).detach()
    pull = _log_sum(-loss.gamma * a_p * (S - 1 + loss.margin), P)
    return softplus(pull + _log_sum(loss.gamma * a_n * (S - loss.margin), N))


def smooth_ap(S, P, N, loss):
    """Return one minus the mean precision at the smoothed ranks of all positives."""
    among_positives, among_all = _ranks(S, P, N, loss.temperature)
    return torch.where(P.any(dim=1), 1 - _mean(among_positives / among_all, P), 0.0)


def recall_at_k(S, P, N, loss):
    """Return one minus the mean of the smoothed recalls at k."""
    _, ranks = _ranks(S, P, N, loss.temperature)
    n, recall = P.sum(dim=1), 0
    for k in loss.k:
        within = torch.sigmoid((k - ranks) / loss.rank_temperature)
        recall = recall + (within * P).sum(dim=1) / n.clamp(min=1, max=k)
    return torch.where(n > 0, 1 - recall / len(loss.k), 0.0)


LOSSES = {
    "contrastive": contrastive,
    "binomial-deviance": binomial_deviance,
    "triplet": triplet,
    "semi-hard-triplet": semi_hard_triplet,
    "batch-hard-triplet": batch_hard_triplet,
    "multi-similarity": multi_similarity,
    "nt-xent": nt_xent,
    "info-nce": nt_xent,
    "n-pair": nt_xent,
    "supcon": supcon,
    "nca": nca,
    "lifted-structure": lifted_structure,
    "circle": circle,
    "tuplet-margin": tuplet_margin,
    "margin": margin,
    "smooth-ap": smooth_ap,
    "recall-at-k": recall_at_k,
}
BY_THREE = {"triplet", "semi-hard-triplet", "smooth-ap", "recall-at-k"}
"""Losses that compare rows with rows and therefore need (B, M, M) arrays here."""


def softplus(x):
    """Return log(1 + exp(x)). PyTorch's softplus returns x above 20, which is inexact in float64."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _mean(x, pairs):
    return (x * pairs).sum(dim=1) / pairs.sum(dim=1).clamp(min=1)


def _hinges(pull, push, P):
    return pull.sum(dim=1) / P.sum(dim=1).clamp(min=1) + push.sum(dim=1) / (push > 0).sum(dim=1).clamp(min=1)


def _log_sum(x, pairs):
    return x.masked_fill(~pairs, -torch.inf).logsumexp(dim=1)


def _triplets(S, P, N, margin, counts):
    gap = S[:, None, :] - S[:, :, None]  # (B, p, n)
    cost = (gap + margin).clamp(min=0) * P[:, :, None] * N[:, None, :] * counts(gap)
    return cost.sum(dim=(1, 2)) / (cost > 0).sum(dim=(1, 2)).clamp(min=1)


def _ranks(S, P, N, temperature):
    """Return each row's smoothed rank among the positives and among all rows, (B, M), as if it were a positive."""
    before = torch.sigmoid((S[:, None, :] - S[:, :, None]) / temperature)  # (B, p, j)
    before = before * ~torch.eye(S.shape[1], dtype=torch.bool, device=S.device)
    among_positives = 1 + (before * P[:, None, :]).sum(dim=2)
    return among_positives, among_positives + (before * N[:, None, :]).sum(dim=2)
