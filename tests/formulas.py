"""Reference implementations of every pair loss: loops over one anchor's pairs, in float64, from the formula.

A formula takes a list of similarities of the positives and one of the negatives, and returns L_i. `held` are the same
similarities where the formula treats them as constants. This only matters for derivatives.
"""

from math import acos, cos, exp, log, log1p, radians, sqrt


def hinge(x):
    """Return max(x, 0)."""
    return max(x, 0.0)


def softplus(x):
    """Return log(1 + exp(x))."""
    return x + log1p(exp(-x)) if x > 0 else log1p(exp(x))


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return exp(min(x, 0.0)) / (exp(min(x, 0.0)) + exp(-max(x, 0.0)))


def log_sum(terms):
    """Return log sum exp of a list with at least one entry."""
    peak = max(terms)
    return peak + log(sum(exp(term - peak) for term in terms))


def mean(costs, n=None):
    """Return the sum of costs divided by n, by default their number; 0 without costs."""
    n = len(costs) if n is None else n
    return sum(costs) / n if n else 0.0


def contrastive(P, N, held, *, pos_margin=1.0, neg_margin=0.5):
    """Return the mean hinge of positives plus the mean hinge of active negatives."""
    push = [s - neg_margin for s in N if s > neg_margin]
    return mean([hinge(pos_margin - s) for s in P]) + mean(push)


def contrastive_sum(P, N, held):
    """Return the sum of the hinges of positives and negatives."""
    return sum(hinge(1.0 - s) for s in P) + sum(hinge(s - 0.5) for s in N)


def margin(P, N, held, *, alpha=0.2, beta=1.2):
    """Return the mean distance hinge of positives plus that of active negatives."""
    push = [alpha - sqrt(2 - 2 * s) + beta for s in N if alpha - sqrt(2 - 2 * s) + beta > 0]
    return mean([hinge(alpha + sqrt(2 - 2 * s) - beta) for s in P]) + mean(push)


def binomial_deviance(P, N, held, *, alpha=2.0, beta=50.0, base=0.5):
    """Return the mean softplus of positives plus the mean softplus of negatives."""
    return mean([softplus(-alpha * (s - base)) for s in P]) + mean([softplus(beta * (s - base)) for s in N])


def triplets(P, N, *, m, semi_hard=False):
    """Return the costs of all active triplets."""
    costs = [(n - p + m, n < p) for p in P for n in N]
    return [cost for cost, easier in costs if cost > 0 and (easier or not semi_hard)]


def triplet(P, N, held, *, m=0.2):
    """Return the mean over active triplets."""
    return mean(triplets(P, N, m=m))


def triplet_sum(P, N, held, *, m=0.2):
    """Return the sum over triplets."""
    return sum(triplets(P, N, m=m))


def semi_hard_triplet(P, N, held, *, m=0.2):
    """Return the mean over semi-hard triplets."""
    return mean(triplets(P, N, m=m, semi_hard=True))


def batch_hard_triplet(P, N, held, *, m=0.2, soft=False):
    """Return the cost of the hardest triplet."""
    if not P or not N:
        return 0.0
    gap = max(N) - min(P) + m
    return softplus(gap) if soft else hinge(gap)


def multi_similarity(P, N, held, *, alpha=2.0, beta=50.0, base=0.5):
    """Return log(1 + sum) of each side, divided by its scale."""
    pull = log(1 + sum(exp(-alpha * (s - base)) for s in P)) / alpha
    return pull + log(1 + sum(exp(beta * (s - base)) for s in N)) / beta


def nt_xent(P, N, held, *, t=0.07):
    """Return the mean over positives of -log softmax among the positive and all negatives."""
    return mean([-log(exp(p / t) / (exp(p / t) + sum(exp(n / t) for n in N))) for p in P])


def supcon(P, N, held, *, t=0.1):
    """Return the mean over positives of -log softmax among all pairs."""
    return mean([log_sum([s / t for s in P + N]) - p / t for p in P])


def nca(P, N, held, *, t=0.1):
    """Return -log of the positives' share of the sum over all pairs."""
    return -log(sum(exp(s / t) for s in P) / sum(exp(s / t) for s in P + N)) if P else 0.0


def lifted_structure(P, N, held, *, pos_margin=1.0, neg_margin=0.0, gamma=1.0):
    """Return the hinge of the sum of the two logarithms."""
    if not P or not N:
        return 0.0
    pull, push = log_sum([gamma * (pos_margin - s) for s in P]), log_sum([gamma * (s - neg_margin) for s in N])
    return hinge(pull + push) / gamma


def circle(P, N, held, *, m=0.4, gamma=80.0):
    """Return log(1 + sum sum exp), with each pair's factor constant."""
    if not P or not N:
        return 0.0
    of_P, of_N = held
    pull = [-gamma * hinge(1 + m - h) * (s - (1 - m)) for s, h in zip(P, of_P, strict=True)]
    push = [gamma * hinge(h + m) * (s - m) for s, h in zip(N, of_N, strict=True)]
    return softplus(log_sum(pull) + log_sum(push))


def tuplet_margin(P, N, held, *, degrees=5.73, scale=64.0):
    """Return the mean over positives of log(1 + sum exp(s (S_n - cos(theta_p - beta))))."""
    if not N:
        return 0.0
    eased = [scale * cos(acos(p) - radians(degrees)) for p in P]
    return mean([softplus(log_sum([scale * n for n in N]) - x) for x in eased])


def ranks(P, N, t):
    """Return the smooth ranks (among positives, among all) of each positive."""
    found = []
    for i, p in enumerate(P):
        G = 1 + sum(sigmoid((s - p) / t) for j, s in enumerate(P) if j != i)
        found.append((G, G + sum(sigmoid((n - p) / t) for n in N)))
    return found


def smooth_ap(P, N, held, *, t=0.01):
    """Return 1 - the mean precision at the ranks of positives."""
    return 1 - mean([G / R for G, R in ranks(P, N, t)]) if P else 0.0


def recall_at_k(P, N, held, *, ks=(1, 2, 4, 8, 16), t=0.01, t_rank=1.0):
    """Return 1 - mean recall at k."""
    if not P:
        return 0.0
    found = ranks(P, N, t)
    return 1 - mean([sum(sigmoid((k - R) / t_rank) for _, R in found) / min(k, len(P)) for k in ks])


def rows(formula, S, P, N, held=None):
    """Return [L_i] of a formula for similarities (B, m) and pair masks (B, m) of 0 and 1."""
    held = S if held is None else held

    def chosen(row, pairs):
        return [s for s, one in zip(row, pairs, strict=True) if one]

    return [
        formula(chosen(s, p), chosen(s, n), (chosen(h, p), chosen(h, n)))
        for s, p, n, h in zip(S.tolist(), P.tolist(), N.tolist(), held.tolist(), strict=True)
    ]
