"""pytorch-metric-learning's losses and miners give the same results within XBM as without it."""

import copy
import inspect
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers, regularizers
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_pairs

import xbm as core
from tests.integrations.test_torch import numbers
from xbm.integrations.pytorch_metric_learning.loss import OURS
from xbm.integrations.torch import XBM
from xbm.losses import LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "pytorch-metric-learning.md"
DISTANCES = (CosineSimilarity, DotProductSimilarity, LpDistance)
DIM = 4

SUPPORTED = [
    losses.CircleLoss(),
    losses.ContrastiveLoss(),
    losses.ContrastiveLoss(distance=LpDistance(power=2)),
    losses.ContrastiveLoss(pos_margin=1, neg_margin=0.2, distance=CosineSimilarity()),
    losses.ContrastiveLoss(pos_margin=1, neg_margin=0.2, distance=DotProductSimilarity(power=3)),
    losses.GeneralizedLiftedStructureLoss(),
    losses.GeneralizedLiftedStructureLoss(distance=CosineSimilarity()),
    losses.IntraPairVarianceLoss(),
    losses.MarginLoss(),
    losses.MarginLoss(learn_beta=True, nu=0.1, beta=1.0),
    losses.MultiSimilarityLoss(),
    losses.MultiSimilarityLoss(distance=LpDistance(), reducer=reducers.PerAnchorReducer()),
    losses.NTXentLoss(),
    losses.NTXentLoss(distance=LpDistance(), reducer=reducers.SumReducer()),
    losses.SupConLoss(),
    losses.SupConLoss(distance=LpDistance()),
    losses.TripletMarginLoss(),
    losses.TripletMarginLoss(margin=0.3, smooth_loss=True, distance=CosineSimilarity()),
    losses.TupletMarginLoss(),
]
MINERS = [
    miners.BatchEasyHardMiner(),
    miners.BatchEasyHardMiner(pos_strategy="semihard", neg_strategy="hard", distance=CosineSimilarity()),
    miners.BatchEasyHardMiner(pos_strategy="all", neg_strategy="easy", allowed_neg_range=(0.2, 1.6)),
    miners.BatchHardMiner(),
    miners.BatchHardMiner(distance=CosineSimilarity()),
    miners.MultiSimilarityMiner(epsilon=0.05),
    miners.MultiSimilarityMiner(distance=LpDistance()),
    miners.PairMarginMiner(),
    miners.PairMarginMiner(pos_margin=0.6, neg_margin=0.1, distance=CosineSimilarity()),
    miners.TripletMarginMiner(),
    miners.TripletMarginMiner(type_of_triplets="hard"),
    miners.TripletMarginMiner(type_of_triplets="semihard", margin=0.5, distance=CosineSimilarity()),
    miners.TripletMarginMiner(type_of_triplets="easy"),
]


def named(one):
    """Return a test id for a loss or a miner."""
    return f"{type(one).__name__}-{type(one.distance).__name__}"


def filled(loss, calls=3, **options):
    """Return a module with a partly filled memory, and the next batch: anchors that require grad, labels, ids."""
    module = XBM(DIM, 30, loss, **{"warmup": 0, "dtype": torch.float64, **options})
    *before, (x, labels, ids) = numbers(0, calls + 1, size=7, dtype=torch.float64)
    for old, old_labels, old_ids in before:
        module(old, old_labels, ids=old_ids)
    return module, (x.requires_grad_(), labels, ids)


def memory_of(module):
    """Return the filled rows and their labels, by slot."""
    rows = slice(0, int(module.count))
    return module.embeddings[rows].clone(), module.labels[rows].clone()


def assert_same(ours, theirs, *inputs):
    """Assert that two losses have the same value and the same gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def named_by(options):
    """Return a test id for options of the module."""
    return "-".join(f"{name}-{getattr(one, '__name__', type(one).__name__)}" for name, one in options.items())


class Seen:
    """A function as a loss, which records its pairs."""

    def __call__(self, S, positive, negative):
        self.pairs = positive, negative
        return (S * (positive | negative)).sum(dim=1)


def masks(indices, shape):
    """Return a miner's result as positive and negative pairs."""
    a1, p, a2, n = convert_to_pairs(indices, None)
    positive, negative = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    positive[a1, p], negative[a2, n] = True, True
    return positive, negative


@pytest.mark.parametrize("loss", SUPPORTED, ids=named)
def test_in_the_batch_it_is_their_loss(loss):
    module, (x, labels, _) = filled(loss, weight=0)
    assert_same(module(x, labels), loss(x, labels), x, *loss.parameters())


@pytest.mark.parametrize("loss", SUPPORTED, ids=named)
def test_against_the_memory_it_is_their_loss_against_its_rows(loss):
    module, (x, labels, _) = filled(loss, in_batch=False)
    ours = module(x, labels, enqueue=torch.zeros(len(x), dtype=torch.bool))
    rows, row_labels = memory_of(module)
    assert len(rows) != len(x)
    assert_same(ours, loss(x, labels, ref_emb=rows, ref_labels=row_labels), x, *loss.parameters())


@pytest.mark.parametrize("loss", SUPPORTED, ids=named)
def test_own_slots_and_copies_are_no_pairs(loss):
    module, (x, labels, ids) = filled(loss, in_batch=False)
    cursor, step = int(module.cursor), int(module.step)
    ours = module(x, labels, ids=ids)
    rows, row_labels = memory_of(module)
    positive, negative = (torch.zeros(len(x), len(rows), dtype=torch.bool) for _ in range(2))
    for i in range(len(x)):
        for j in range(len(rows)):
            copy_of_i = module.ids[j] == ids[i] and module.stored_at[j] < step
            if j != (cursor + i) % module.capacity and not copy_of_i:
                (positive if row_labels[j] == labels[i] else negative)[i, j] = True
    assert int((positive | negative).sum()) < len(x) * (len(rows) - 1)
    pairs = (*torch.nonzero(positive, as_tuple=True), *torch.nonzero(negative, as_tuple=True))
    assert_same(ours, loss(x, labels, pairs, ref_emb=rows, ref_labels=row_labels), x)


@pytest.mark.parametrize("miner", MINERS, ids=named)
def test_a_miner_selects_what_it_selects_there(miner):
    for options in ({"weight": 0}, {"in_batch": False}):
        module, (x, labels, _) = filled(seen := Seen(), miner=miner, **options)
        module(x, labels, enqueue=torch.zeros(len(x), dtype=torch.bool))
        rows, row_labels = (x.detach(), labels) if "weight" in options else memory_of(module)
        there = miner(x, labels) if "weight" in options else miner(x, labels, rows, row_labels)
        for ours, theirs in zip(seen.pairs, masks(there, (len(x), len(rows))), strict=True):
            assert torch.equal(ours[:, : len(rows)], theirs)
            assert theirs.any()
            assert not ours[:, len(rows) :].any()


def test_a_miner_that_draws_draws_from_the_same_pairs():
    torch.manual_seed(0)
    miner = miners.DistanceWeightedMiner(nonzero_loss_cutoff=1.2)
    module, (x, labels, _) = filled(seen := Seen(), miner=miner, in_batch=False)
    rows, row_labels = memory_of(module)
    ours, theirs = torch.zeros(2, len(x), len(rows)), torch.zeros(2, len(x), len(rows))
    for _ in range(300):
        module(x, labels, enqueue=torch.zeros(len(x), dtype=torch.bool))
        ours += torch.stack(seen.pairs)[:, :, : len(rows)]
        theirs += torch.stack(masks(miner(x, labels, rows, row_labels), (len(x), len(rows))))
    assert torch.equal(ours > 0, theirs > 0)
    assert 0 < (theirs[1] > 0).sum() < (labels[:, None] != row_labels).sum()
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=60)  # out of 300


@pytest.mark.parametrize("miner", MINERS, ids=named)
@pytest.mark.parametrize(
    "loss", [losses.TripletMarginLoss(), losses.MarginLoss(), losses.MultiSimilarityLoss()], ids=named
)
def test_their_miner_feeds_their_loss(loss, miner):
    module, (x, labels, _) = filled(loss, miner=miner, weight=0)
    assert_same(module(x, labels), loss(x, labels, miner(x, labels)), x)
    module, (x, labels, _) = filled(loss, miner=miner, in_batch=False)
    ours = module(x, labels, enqueue=torch.zeros(len(x), dtype=torch.bool))
    rows, row_labels = memory_of(module)
    mined = miner(x, labels, rows, row_labels)
    assert_same(ours, loss(x, labels, mined, ref_emb=rows, ref_labels=row_labels), x)


@pytest.mark.parametrize("loss", SUPPORTED, ids=named)
def test_it_is_their_cross_batch_memory(loss):
    there = losses.CrossBatchMemory(loss, DIM, memory_size=21)
    here = XBM(DIM, 21, loss, in_batch=False, warmup=0, dtype=torch.float64)
    for call, (x, labels, _) in enumerate(numbers(0, 8, size=7, dtype=torch.float64)):
        x.requires_grad_()
        if call % 4 < 3:
            assert_same(here(x, labels), there(x, labels), x)
        else:
            mask = torch.arange(len(x)) < 3
            ours = here(x[~mask], labels[~mask], keys=x[mask], key_labels=labels[mask])
            assert_same(ours, there(x, labels, enqueue_mask=mask), x)


def test_theirs_and_ours_go_together():
    found = []
    for loss in ("multi-similarity", losses.MultiSimilarityLoss()):
        for miner in ("multi-similarity", miners.MultiSimilarityMiner()):
            module, (x, labels, ids) = filled(loss, miner=miner)
            module.objective = replace(module.objective, block_rows=5)  # smaller than the memory
            module(x, labels, ids=ids).backward()
            found.append((module.report["memory_loss"], x.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)  # the report is float32


class AllButTheFirst(core.Miner):
    """A miner that leaves the first anchor without pairs."""

    def select(self, block, r):
        kept = (block.anchors > 0)[:, None]
        return block._replace(P=block.P * kept, N=block.N * kept)


@pytest.mark.parametrize("loss", SUPPORTED, ids=named)
def test_an_anchor_without_pairs_does_not_change_their_mean(loss):
    module, (x, labels, _) = filled(loss, miner=AllButTheFirst(), weight=0)
    same, others = labels[:, None] == labels, ~torch.eye(len(x), dtype=torch.bool)
    others[0] = False
    pairs = (*torch.nonzero(same & others, as_tuple=True), *torch.nonzero(~same & others, as_tuple=True))
    assert_same(module(x, labels), loss(x, labels, pairs), x)


def test_learned_parameters_are_trained_saved_and_copied():
    module, (x, labels, _) = filled(losses.MarginLoss(learn_beta=True, beta=1.0))
    (name, beta), *others = module.named_parameters()
    assert name == "loss.beta"
    assert not others
    twin, state = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x, labels).backward()
    optimizer.step()
    assert float(beta.detach()) != pytest.approx(1.0)
    assert float(twin.loss.beta.detach()) == 1.0
    twin(x, labels).backward()
    assert twin.loss.beta.grad is not None
    module.load_state_dict(state)
    assert float(beta.detach()) == 1.0


def test_training_resumes():
    def fresh():
        module = XBM(DIM, 20, losses.MarginLoss(learn_beta=True), miner=miners.TripletMarginMiner(), warmup=1)
        return module, torch.optim.SGD(module.parameters(), lr=0.1)

    def trained(module, optimizer, history):
        found = []
        for x, labels, ids in history:
            optimizer.zero_grad()
            loss = module(x, labels, ids=ids)
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    history = list(numbers(0, 6))
    for one in history:
        one[0].requires_grad_()
    uninterrupted = trained(*fresh(), history)
    module, optimizer = fresh()
    begun = trained(module, optimizer, history[:3])
    torch.save(module.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    again, optimizer = fresh()
    again.load_state_dict(torch.load(saved))
    assert begun + trained(again, optimizer, history[3:]) == uninterrupted


class Breaks(losses.ContrastiveLoss):
    """A loss that raises an error on request."""

    broken = False

    def compute_loss(self, *args):
        if self.broken:
            raise ArithmeticError("broken")
        return super().compute_loss(*args)


def test_the_distance_is_put_back_even_after_an_exception():
    loss, miner = Breaks(), miners.MultiSimilarityMiner()
    own = loss.distance, miner.distance
    module = XBM(DIM, 20, loss, miner=miner, warmup=0)
    x, labels, _ = next(numbers(0, 1))
    module(x, labels)
    assert (loss.distance, miner.distance) == own
    loss.broken = True
    with pytest.raises(ArithmeticError):
        module(x, labels)
    assert (loss.distance, miner.distance) == own
    assert int(module.count) == len(x)
    assert int(module.step) == 1


@pytest.mark.parametrize("power", [1, 2])
def test_rows_at_no_distance_have_no_gradient(power):
    x = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.8, -0.6]], dtype=torch.float64, requires_grad=True)
    loss = losses.ContrastiveLoss(distance=LpDistance(power=power))
    module = XBM(2, 8, loss, warmup=0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(module(x, torch.tensor([0, 0, 1])), x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_products_of_embeddings_of_any_length():
    plain = DotProductSimilarity(normalize_embeddings=False)
    loss = losses.ContrastiveLoss(pos_margin=1, neg_margin=0.2, distance=plain)
    module, (x, labels, _) = filled(loss, normalize=False, in_batch=False)
    ours = module(x, labels, enqueue=torch.zeros(len(x), dtype=torch.bool))
    rows, row_labels = memory_of(module)
    assert_same(ours, loss(x, labels, ref_emb=rows, ref_labels=row_labels), x)
    with pytest.raises(ValueError, match="needs normalize=True"):
        XBM(DIM, 20, losses.ContrastiveLoss(), normalize=False)
    for one in (loss, "contrastive"):
        with pytest.raises(ValueError, match="needs normalize=True"):
            XBM(DIM, 20, one, miner=miners.MultiSimilarityMiner(), normalize=False)


def test_a_miner_says_that_it_is_eager():
    module = XBM(DIM, 20, "multi-similarity", miner=miners.MultiSimilarityMiner(), warmup=0)
    x, labels, _ = next(numbers(0, 1))
    with pytest.raises(Exception, match="does not support pytorch-metric-learning's miners"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x, labels)


def test_nothing_of_theirs_is_imported_for_ours():
    program = "from xbm.integrations.torch import XBM; XBM(4, 8, 'contrastive', miner='multi-similarity'); import sys"
    check = f"{program}; print('pytorch_metric_learning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


class Curious(losses.ContrastiveLoss):
    """A loss that depends on all rows, and counts its calls."""

    def __init__(self, at_all=True):
        super().__init__()
        self.at_all = at_all
        self.register_buffer("calls", torch.tensor(0))

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        self.calls += 1
        found = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        found["pos_loss"]["losses"] += self.at_all * self.distance(embeddings, ref_emb).mean()
        return found


def test_a_trial_leaves_no_trace():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    loss = Curious(at_all=False)
    XBM(DIM, 20, loss, miner=miners.DistanceWeightedMiner())
    assert int(loss.calls) == 0
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": 3}, "loss must be one of the names"),
        ({"loss": losses.ContrastiveLoss}, "loss must be one of the names"),
        ({"miner": miners.PairMarginMiner}, "miner must be one of the names"),
        ({"loss": miners.PairMarginMiner()}, "loss must be an xbm loss or a pair loss of pytorch-metric-learning"),
        ({"miner": losses.ContrastiveLoss()}, "miner must be an xbm.Miner or a miner of pytorch-metric-learning"),
        ({"loss": losses.CrossBatchMemory(losses.ContrastiveLoss(), DIM)}, "wrapper such as CrossBatchMemory"),
        ({"loss": losses.SignalToNoiseRatioContrastiveLoss()}, "must have a CosineSimilarity"),
        ({"loss": losses.ContrastiveLoss(distance=LpDistance(normalize_embeddings=False))}, "must have a Cosine"),
        ({"loss": losses.ContrastiveLoss(distance=LpDistance(p=1))}, "must have a CosineSimilarity.* p=1"),
        ({"miner": miners.PairMarginMiner(distance=LpDistance(p=1))}, "must have a CosineSimilarity.* p=1"),
        ({"loss": losses.NCALoss()}, "labels are required.* use xbm's loss='nca'"),
        ({"loss": losses.AngularLoss()}, "labels are required.* use one of xbm's losses: .*'contrastive'"),
        ({"loss": losses.TripletMarginLoss(swap=True)}, "out of bounds"),
        ({"loss": losses.MarginLoss(num_classes=9)}, "without labels"),
        ({"loss": losses.LiftedStructureLoss()}, "the order of rows.* use xbm's loss='lifted-structure'"),
        ({"loss": losses.DynamicSoftMarginLoss()}, "it depends on"),
        ({"loss": Curious()}, "it depends on.* other rows"),
        ({"loss": losses.ContrastiveLoss(reducer=reducers.ClassWeightedReducer(torch.ones(9)))}, "without labels"),
        (
            {"loss": losses.ContrastiveLoss(embedding_regularizer=regularizers.CenterInvariantRegularizer())},
            "it depends on embeddings",
        ),
        ({"miner": miners.AngularMiner()}, "it raised.* use one of xbm's miners: .*'margin'"),
        ({"miner": miners.HDCMiner()}, "of all anchors at once"),
    ],
    ids=lambda value: value if isinstance(value, str) else named_by(value),
)
def test_what_does_not_fit_is_refused(options, sentence):
    with pytest.raises(TypeError, match=sentence):
        XBM(DIM, 20, **options)


def test_our_losses_that_refusals_name_exist():
    assert set(OURS.values()) <= set(LOSSES)


CONSTANTS = {"num_classes": 5, "embedding_size": DIM, "descriptors_dim": DIM, "l": DIM, "margin": 0.4, "Tn": 1}
"""Arguments for pytorch-metric-learning's losses without defaults."""


def made(kind, **options):
    """Create a loss or a miner of pytorch-metric-learning; return None if it does not accept the options."""
    chain = [base.__init__ for base in kind.__mro__ if base.__module__.startswith("pytorch_metric_learning")]
    parameters = [one for each in chain for one in inspect.signature(each).parameters.values()]
    needed = {one.name for one in parameters if one.default is one.empty} & set(CONSTANTS)
    try:
        return kind(**{name: CONSTANTS[name] for name in needed}, **options)
    except (AssertionError, ValueError):  # raised for unsupported distances
        return None


def works(kind, **options):
    """Return whether XBM accepts a loss or a miner of pytorch-metric-learning."""
    one = made(kind, **options)
    try:
        return one is not None and bool(XBM(DIM, 20, **{"loss" if issubclass(kind, LOSS) else "miner": one}))
    except TypeError:
        return False


LOSS, MINER = losses.BaseMetricLossFunction, miners.BaseMiner


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # from LargeMarginSoftmaxLoss
@pytest.mark.parametrize(("module", "base"), [(losses, LOSS), (miners, MINER)], ids=["losses", "miners"])
def test_the_page_says_what_works(module, base):
    kinds = {name: kind for name, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, base)}
    kinds = {name: kind for name, kind in kinds.items() if kind not in (base, losses.GenericPairLoss)}
    works_with = {
        name: [one.__name__ for one in DISTANCES if works(kind, distance=one())] for name, kind in kinds.items()
    }
    refused = {name for name, kind in kinds.items() if not works(kind)}
    assert refused == {name for name, distances in works_with.items() if not distances}
    page = PAGE.read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.*`) \|$", page, re.MULTILINE))
    written = {name: re.findall(r"\w+", distances) for name, distances in rows.items() if name in kinds}
    assert written == {name: distances for name, distances in works_with.items() if distances}
    (list_of_refused,) = re.findall(r"^Refused:\n(.*?)^##", page, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", list_of_refused)) & set(kinds) == refused
