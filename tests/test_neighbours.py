"""Similar-task voting: what the neighbours agree on comes back, sizes are exact and nested, CUT is a special case."""

import itertools
import math

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch

from cut.budget import Parameters, Sparsity, Weights
from cut.fusion import Vote
from cut.library import Entry, Library, base_hash
from cut.limits import Bytes, MACs
from cut.masks import make_mask
from cut.neighbours import SimilarTasks, nearest, newtask
from cut.poll import Neighbour, Poll, ordered, score_mask, votes
from cut.pruning import Pruning
from cut.schedules import Iterative
from cut.scores import Magnitude, Random, Sensitivity, sensitivity
from cut.similarity import CKA, Everyone, RandomSimilarity
from cut.start import Start
from cut.structured import make_unit_mask, plan
from cut.units import cut_units, unit_scores
from tests.newcomers import facts, filled, seen, setting, task_mask, task_scores
from tests.test_pruning import build, fit


def size_of(mask):
    return sum(int(m.sum()) for m in mask.values())


def cut(s, scorer, budget, what="weights", fusion=None, **options):
    """The mask of the new task."""
    scores = scorer(s.model, s.batches, s.losses, [s.new])
    maker = make_mask if what == "weights" else make_unit_mask
    common = {"fusion": fusion or Poll(), "budget": budget, "floor_share": 0.0, "silent": False, **options}
    return maker(s.model, scores, s.batches[0], s.losses, [s.new], **common)


def head_size(s, mask):
    """How many of the new head's weights count as kept next to a mask over the shared ones."""
    density = size_of(mask) / sum(m.numel() for m in mask.values())
    scores = Magnitude()(s.model, s.batches, s.losses, [s.new])["all"]
    head = sum(v.numel() for n, v in scores.items() if n not in s.shared)
    return math.floor(density * head + 1e-9)


@pytest.fixture(scope="module")
def cnn():
    return setting("cnn")


@pytest.fixture(scope="module")
def vit():
    return setting("vit")


# ------------------------------------------------------------------------------------------------------ the vote


def random_ballots(k=4, seed=0, soft=False):
    g = torch.Generator().manual_seed(seed)
    drawn = {f"n{i}": {n: torch.rand(shape, generator=g) for n, shape in SIZES.items()} for i in range(k)}
    return drawn if soft else {k: {n: (v < 0.5).float() for n, v in per.items()} for k, per in drawn.items()}


SIZES = {"a": (3, 4), "b": (5, 2)}


def test_votes_are_the_weighted_share_of_the_neighbours_that_keep_a_unit():
    ballots, weights = random_ballots(), {"n0": 1.0, "n1": 3.0, "n2": 2.0, "n3": 2.0}
    del ballots["n2"]["b"]
    found = votes(ballots, weights)
    for name, shape in SIZES.items():
        for place in itertools.product(*map(range, shape)):
            pairs = [(weights[k], float(per[name][place])) for k, per in ballots.items() if name in per]
            assert float(found[name][place]) == pytest.approx(sum(w * v for w, v in pairs) / sum(w for w, _ in pairs))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.51, 0.75, 1.0])
def test_a_vote_by_share_is_the_value_that_so_much_weight_reaches(share):
    ballots, weights = random_ballots(soft=True), {"n0": 1.0, "n1": 3.0, "n2": 2.0, "n3": 2.0}
    found = votes(ballots, weights, share)
    for name, shape in SIZES.items():
        for place in itertools.product(*map(range, shape)):
            pairs = sorted(((float(per[name][place]), weights[k]) for k, per in ballots.items()), reverse=True)
            reached = [v for i, (v, _) in enumerate(pairs) if sum(w for _, w in pairs[: i + 1]) / 8 >= share - 1e-9]
            assert float(found[name][place]) == pytest.approx(reached[0])


def test_order_is_vote_then_second_key_then_index():
    g = torch.Generator().manual_seed(0)
    first = {n: torch.randint(0, 3, s, generator=g).double() for n, s in SIZES.items()}
    second = {n: torch.randint(0, 3, s, generator=g).double() for n, s in SIZES.items()}
    flat = [torch.cat([v[n].flatten() for n in sorted(SIZES)]).tolist() for v in (first, second)]
    units = range(len(flat[0]))
    for keys, ties in ((flat, second), (flat[:1], None)):
        wanted = sorted(units, key=lambda u: (*(-k[u] for k in keys), u))
        scores = ordered(first, ties)
        values = torch.cat([scores[n].flatten() for n in sorted(SIZES)])
        assert values.sort(descending=True).indices.tolist() == wanted
        assert values.sort().values.tolist() == [*units]
        assert all(scores[n].shape == first[n].shape for n in SIZES)


def test_a_neighbours_key_says_how_it_votes():
    for weight, whole, soft in itertools.product((1.0, 1 / 3, 1e-9), (False, True), (False, True)):
        voter = Neighbour("seg-1a2b", weight, whole, soft)
        found = Neighbour.of(voter.key)
        assert (found.name, found.whole, found.soft) == ("seg-1a2b", whole, soft)
        assert found.weight > 0 and found.weight == pytest.approx(weight, abs=1e-6)
        assert Neighbour.of(found.key) == found
    assert Neighbour.of("seg") is None and Neighbour.of("all") is None


def test_weights_of_votes_add_up_to_the_bit_in_any_order():
    weights = [Neighbour.of(Neighbour("x", w).key).weight for w in torch.rand(50).tolist()]
    assert len({sum(itertools.islice(itertools.cycle(weights), i, i + 50)) for i in range(50)}) == 1


def test_score_mask_puts_a_neighbours_mask_in_front():
    ballots = random_ballots(1)
    scores = score_mask(ballots, {"n0": 1.0}, {n: torch.rand(s) for n, s in SIZES.items()})
    flat = torch.cat([scores[n].flatten() for n in sorted(SIZES)])
    kept = torch.cat([ballots["n0"][n].flatten() for n in sorted(SIZES)]) > 0
    assert flat[kept].min() > flat[~kept].max()


# -------------------------------------------------------------------------------------------- masks over weights


@pytest.mark.parametrize("tie", ["magnitude", "taylor"])
@pytest.mark.parametrize("k", [1, 3, None])
def test_identical_masks_come_back_at_their_size(k, tie, cnn, tmp_path):
    mask = task_mask(cnn, "seg")
    library = filled(cnn, tmp_path, [("seg", mask), ("depth", mask), ("normal", mask)])
    similarity = Everyone() if k is None else RandomSimilarity(1)
    mask = seen(cnn, mask)
    found = cut(cnn, SimilarTasks(library, similarity, k, tie=tie), Weights(size_of(mask) + head_size(cnn, mask)))
    assert len(mask) > 5 and all(torch.equal(found[n], m) for n, m in mask.items())


def test_one_neighbour_gives_its_mask_at_its_size(cnn, tmp_path):
    masks = {t: task_mask(cnn, t, s) for t, s in (("seg", 0.6), ("depth", 0.7), ("normal", 0.8))}
    library = filled(cnn, tmp_path, list(masks.items()))
    scorer = SimilarTasks(str(tmp_path), RandomSimilarity(3), k=1)
    scorer(cnn.model, cnn.batches, cnn.losses, [cnn.new])
    entry = library.read(next(iter(scorer.weights)))
    mask = seen(cnn, masks[entry.task])
    found = cut(cnn, scorer, Weights(size_of(mask) + head_size(cnn, mask)))
    assert all(torch.equal(found[n], m) for n, m in mask.items())


def test_any_size_is_met_exactly_and_smaller_lies_within_larger(cnn, tmp_path):
    filled(cnn, tmp_path, [(t, task_mask(cnn, t)) for t in ("seg", "depth", "normal")])
    scorer = SimilarTasks(str(tmp_path), k=2)
    before = None
    for count in (300, 1000, 3000, 6000):
        mask = cut(cnn, scorer, Weights(count), floor_share=0.01)
        assert size_of(mask) == count
        assert before is None or all((mask[n] | ~before[n]).all() for n in mask)
        before = mask
    parameters = cut(cnn, scorer, Parameters(3000))
    sparse = cut(cnn, scorer, Sparsity(0.9))
    assert all((parameters[n] | ~sparse[n]).all() for n in sparse)


def test_order_and_names_of_entries_do_not_matter(cnn, tmp_path):
    masks = [(t, task_mask(cnn, t, seed=i)) for i, t in enumerate(("seg", "depth", "normal", "seg"))]
    filled(cnn, tmp_path / "a", masks)
    filled(cnn, tmp_path / "b", masks[::-1])
    for index, name in enumerate(Library(tmp_path / "b").names()):
        (tmp_path / "b" / name).rename(tmp_path / "b" / f"{9 - index}-x")
    random, everyone = {"similarity": RandomSimilarity(5)}, {"similarity": Everyone()}
    for options in ({"k": 2}, {"k": 2, **random}, {"k": 3, "temperature": 0.05}, {"k": None, **everyone}):
        masks = [cut(cnn, SimilarTasks(str(tmp_path / x), **options), Sparsity(0.85)) for x in "ab"]
        assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.51, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_for_tasks_that_the_model_knows_it_is_cuts_vote(share, floor, cnn, tmp_path):
    tasks = ["seg", "depth", "normal", "scene"]
    scores = sensitivity(cnn.model, cnn.batches, cnn.losses, tasks)
    library = Library(tmp_path)
    for task in tasks[::-1]:
        mask = task_mask(cnn, task)
        library.add(mask, facts(cnn, task), scores[task], cnn.shared)
    options = {"budget": Sparsity(0.9), "floor_share": floor}
    wanted = make_mask(cnn.model, scores, cnn.batches[0], cnn.losses, tasks, fusion=Vote(share), **options)
    scorer = SimilarTasks(library, Everyone(), None, soft=True, tie="taylor", batches=len(cnn.batches))
    poll = Poll(share, tie=False, head="joint")
    own = scorer(cnn.model, cnn.batches, cnn.losses, tasks)
    found = make_mask(cnn.model, own, cnn.batches[0], cnn.losses, tasks, fusion=poll, **options)
    assert set(found) == set(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_without_neighbours_the_poll_is_cuts_vote():
    scores = random_ballots(3, soft=True)
    for share in (None, 0.0, 1.0):
        wanted = Vote(0.5 if share is None else share)(scores).values()
        assert all(torch.equal(v, wanted[n]) for n, v in Poll(share)(scores).values().items())


def test_a_unit_that_is_cut_already_comes_last():
    masks = random_ballots(3)
    scores = {Neighbour(k, 1 / 3).key: per for k, per in masks.items()} | {
        "all": {n: torch.rand(s) for n, s in SIZES.items()}
    }
    gone = {n: torch.rand(s) < 0.3 for n, s in SIZES.items()}
    behind = {k: {n: v.masked_fill(gone[n], -1.0) for n, v in per.items()} for k, per in scores.items()}
    found = Poll()(behind).scores["fused"]
    assert torch.cat([found[n][gone[n]] for n in SIZES]).max() < torch.cat([found[n][~gone[n]] for n in SIZES]).min()


def test_the_new_head_is_cut_to_its_neighbours_density(cnn, tmp_path):
    library = filled(cnn, tmp_path, [("seg", task_mask(cnn, "seg", 0.75))])
    mask = seen(cnn, task_mask(cnn, "seg", 0.75))
    density = size_of(mask) / sum(m.numel() for m in mask.values())
    count = size_of(mask) + head_size(cnn, mask)
    found = cut(cnn, SimilarTasks(library, Everyone(), k=None), Weights(count))
    head = [n for n in found if n not in cnn.shared]
    weights = sum(found[n].numel() for n in head)
    assert sum(int(found[n].sum()) for n in head) == pytest.approx(density * weights, abs=1)


# ---------------------------------------------------------------------------------------- channels, heads, neurons


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_identical_masks_of_units_come_back_and_sizes_are_nested(kind, tmp_path, request):
    s = request.getfixturevalue(kind)
    mask = task_mask(s, "seg", 0.5, "channels")
    filled(s, tmp_path, [("seg", mask), ("depth", mask)], "channels")
    scorer = SimilarTasks(str(tmp_path), Everyone(), k=None)
    known = plan(s.model, s.batches[0], s.losses, [s.new])
    shared = [g for g in known.groups if any(t.name in s.shared for t in g.slots)]
    assert len(shared) > 1
    kept = {n: ~c for n, c in cut_units(shared, mask).items()}
    scores = scorer(s.model, s.batches, s.losses, [s.new])
    options = {"fusion": Poll(), "floor_share": 0.0, "silent": False, "units": known}
    masks = []
    for density in (0.9, 0.6, 0.45, 0.3):
        budget = MACs(density)
        found = make_unit_mask(s.model, scores, s.batches[0], s.losses, [s.new], budget=budget, **options)
        left = {n: ~c for n, c in cut_units(known.groups, found).items()}
        assert known.cost.amounts(left)["macs"] <= density * known.cost.dense["macs"] * (1 + 1e-9)
        within = all((kept[g.name] | ~left[g.name]).all() for g in shared)
        beyond = all((left[g.name] | ~kept[g.name]).all() for g in shared)
        assert within or beyond, "what the neighbours keep comes before what they do not"
        masks.append(left)
    for large, small in itertools.pairwise(masks):
        assert all((large[n] | ~small[n]).all() for n in large)
    # The very mask: at what the neighbours' units take, with the new head's own units at their density.
    ranking = Poll()(unit_scores(scores, known.groups))
    values = ranking.values()
    ahead = torch.cat([values[g.name][kept[g.name]] for g in shared]).max()
    behind = torch.cat([values[g.name][~kept[g.name]] for g in shared]).min()
    assert ahead < behind
    both = {n: (v <= ahead) | (v == v.min()) for n, v in values.items()}  # no group goes whole
    amount = known.cost.amounts({**known.cost.everything(), **both})["bytes"] + known.cost.file_overhead
    exact = make_unit_mask(s.model, scores, s.batches[0], s.losses, [s.new], budget=Bytes(amount), **options)
    again = {n: ~c for n, c in cut_units(shared, exact).items()}
    assert all(torch.equal(again[n], kept[n]) for n in kept)


def test_a_vit_is_cut_by_heads_and_neurons(vit):
    known = plan(vit.model, vit.batches[0], vit.losses, [vit.new])
    names = {g.name.split(".")[-1] for g in known.groups}
    assert {"attn", "fc1"} <= names


@pytest.mark.parametrize("soft", [False, True])
def test_masks_over_weights_can_vote_on_channels(soft, cnn, tmp_path):
    masks = [(t, task_mask(cnn, t)) for t in ("seg", "depth", "normal")]
    filled(cnn, tmp_path, masks, scores=[task_scores(cnn, t) for t, _ in masks])
    scorer = SimilarTasks(str(tmp_path), k=2, soft=soft)
    known = plan(cnn.model, cnn.batches[0], cnn.losses, [cnn.new])
    before = None
    for share in (0.5, 0.3):
        found = cut(cnn, scorer, MACs(share), "channels", units=known)
        left = {n: ~c for n, c in cut_units(known.groups, found).items()}
        assert known.cost.amounts(left)["macs"] <= share * known.cost.dense["macs"]
        assert before is None or all((before[n] | ~left[n]).all() for n in left)
        before = left


# ------------------------------------------------------------------------------------------------ the neighbours


def entries_of(count):
    masks = [{"w": torch.tensor([bool(i >> b & 1) for b in range(4)])} for i in range(count)]
    base = {"task": "t", "units": "weights", "base": "b"}
    return [Entry(f"e{i}", base, m) for i, m in enumerate(masks)]


def test_the_nearest_are_those_of_the_highest_similarity():
    entries = entries_of(4)
    near = {"e0": 0.1, "e1": 0.9, "e2": float("nan"), "e3": 0.5}
    assert [(e.name, w) for e, w in nearest(entries, near, 2)] == [("e1", 0.5), ("e3", 0.5)]
    assert [e.name for e, _ in nearest(entries, near, 9)] == ["e1", "e3", "e0"]
    weights = [w for _, w in nearest(entries, near, 3, temperature=0.2)]
    wanted = torch.softmax(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64) / 0.2, 0)
    assert weights == pytest.approx(wanted.tolist()) and sum(weights) == pytest.approx(1)
    assert [e.name for e, _ in nearest(entries, {**near, "e1": -1e300}, 3, 1e-3)] == ["e3", "e0", "e1"]


def test_no_similar_task_is_told():
    entries = entries_of(4)
    with pytest.raises(ValueError, match="no similarity is finite"):
        nearest(entries, dict.fromkeys(["e0", "e1", "e2", "e3"], float("nan")), 2)
    same = dict.fromkeys(["e0", "e1", "e2", "e3"], 0.5)
    with pytest.raises(ValueError, match=r"all 4 similarities are 0.5.*k=None"):
        nearest(entries, same, 2)
    assert len(nearest(entries, same, None)) == len(nearest(entries, same, 4)) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [({"k": 0}, "k 0"), ({"temperature": 0.0}, "temperature"), ({"tie": "size"}, "tie"), ({"batches": 0}, "batches")],
)
def test_bad_choices_are_refused_at_once(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        SimilarTasks(str(tmp_path), **options)
    for bad in ({"share": 1.5}, {"head": "gone"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Poll(**bad)


def test_an_unusable_library_is_told_before_any_work(cnn, tmp_path):
    def call(**options):
        SimilarTasks(str(tmp_path), **options)(cnn.model, cnn.batches, cnn.losses, [cnn.new])

    with pytest.raises(ValueError, match="empty"):
        call()
    mask = task_mask(cnn, "seg")
    library = Library(tmp_path)
    library.add(mask, {"task": "seg", "units": "weights", "base": "f" * 16}, names=cnn.shared)
    with pytest.raises(ValueError, match=f"{'f' * 16}.*{base_hash(cnn.model, cnn.shared)}"):
        call(similarity=Everyone(), k=None)
    call(similarity=Everyone(), k=None, check=False)
    with pytest.raises(ValueError, match="has none"):
        call(similarity=Everyone(), k=None, check=False, soft=True)
    with pytest.raises(ValueError, match="no batches"):
        SimilarTasks(str(tmp_path), check=False)(cnn.model, [], cnn.losses, [cnn.new])
    with pytest.raises(ValueError, match="unknown task 'x'"):
        SimilarTasks(str(tmp_path))(cnn.model, cnn.batches, cnn.losses, ["x"])


def test_one_call_cuts_for_the_new_task_and_tells_a_budget_below_the_floor(tmp_path):
    s = setting("cnn")
    filled(s, tmp_path, [(t, task_mask(s, t)) for t in ("seg", "depth", "normal")])
    scorer = SimilarTasks(str(tmp_path), k=2)
    with pytest.raises(ValueError, match="floor"):
        newtask(s.model, s.batches, s.losses, s.new, scorer, budget=Sparsity(0.95), floor_share=0.2)
    mask = newtask(s.model, s.batches, s.losses, s.new, scorer, budget=Sparsity(0.9))
    parameters = dict(s.model.named_parameters())
    assert all((parameters[n][~m] == 0).all() for n, m in mask.items())
    assert len(scorer.weights) == 2 and set(scorer.similarities) == set(Library(tmp_path).names())
    s = setting("cnn")
    newtask(s.model, iter(s.batches), s.losses, s.new, scorer, budget=MACs(0.4), units="channels")
    with pytest.raises(ValueError, match="units"):
        newtask(s.model, s.batches, s.losses, s.new, scorer, budget=MACs(0.4))


# ------------------------------------------------------------------------------------------- through the trainer


def test_all_parts_are_named_in_a_config(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Pruning, "pruning")
    similar = {
        "class_path": "cut.neighbours.SimilarTasks",
        "init_args": {"library": str(tmp_path), "similarity": {"class_path": "cut.similarity.CKA"}, "k": 2},
    }
    start = {"class_path": "cut.start.Start", "init_args": {"first": similar}}
    budget = {"class_path": "cut.budget.Sparsity", "init_args": {"target": 0.9}}
    fusion = {"class_path": "cut.poll.Poll", "init_args": {"share": 0.5, "head": "joint"}}
    for scorer in (similar, start):
        config = parser.parse_object({"pruning": {"budget": budget, "scorer": scorer, "fusion": fusion}})
        made = parser.instantiate_classes(config).pruning
        found = made.scorer.first if scorer is start else made.scorer
        assert isinstance(found, SimilarTasks) and isinstance(found.similarity, CKA) and found.k == 2
        assert found.library.folder == tmp_path and made.fusion.head == "joint"


class Spy:
    """A scorer that counts its calls."""

    def __init__(self, scorer):
        self.scorer, self.calls = scorer, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.scorer(*args, **kwargs)


def prepared(tmp_path):
    """A library over the trainer's tiny model."""
    model, data = build()
    data.setup("fit")
    batch = data.score_batches(1)[0]
    names = [n for n in sensitivity(model.network, [batch], model.losses, ["seg"])["seg"] if "heads" not in n]
    library = Library(tmp_path / "library")
    for seed, task in enumerate(("normal", "depth")):
        scores = Random(seed)(model.network, [batch], model.losses, ["seg"])["all"]
        mask = {n: scores[n] > 0.7 for n in names}
        base = base_hash(model.network, names)
        library.add(mask, {"task": task, "units": "weights", "base": base})
    return library


def test_similar_tasks_prune_through_the_trainer(tmp_path):
    library = prepared(tmp_path)
    model, data = build()
    scorer = SimilarTasks(library, k=1)
    pruning = Pruning(Sparsity(0.8), ["seg"], scorer, Poll(), batches=2, floor=0.0)
    fit(model, data, [pruning], tmp_path, 1)
    assert pruning.scores and len(scorer.weights) == 1
    entry = library.read(next(iter(scorer.weights)))
    kept = {n: m for n, m in pruning.mask.items() if n in entry.mask}
    assert all((entry.mask[n] | ~kept[n]).all() for n in kept), "0.2 of the weights lie within the neighbour's 0.3"


def test_voting_start_votes_once_then_scores_also_after_a_checkpoint(tmp_path):
    library = prepared(tmp_path)

    def make():
        first, then = Spy(SimilarTasks(library, Everyone(), None)), Spy(Sensitivity())
        schedule = Iterative(rounds=3, every=1, final_sparsity=0.8)
        return Pruning(Sparsity(0.8), ["seg"], Start(first, then), Poll(), schedule, batches=2)

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    model, data = build()
    before = make()
    fit(model, data, [before, Keep()], tmp_path, 3)
    assert (before.scorer.first.calls, before.scorer.then.calls) == (1, 2)
    model, data = build()
    after = make()
    fit(model, data, [after], tmp_path, 3, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert (after.scorer.first.calls, after.scorer.then.calls) == (0, 2)
    assert all(torch.equal(after.mask[n], before.mask[n]) for n in before.mask)
