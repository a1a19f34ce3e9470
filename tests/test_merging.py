"""Merging: scale 0 is the start, one model alone is itself, TIES is the naive loop's, other networks are refused."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from cut.budget import Sparsity
from cut.merged import CutThenMerge, MergedStart
from cut.merging import (
    Arithmetic,
    Average,
    Ties,
    choose_scale,
    combined,
    common_start,
    cut_then_merge,
    masked,
    merge,
    merge_then_cut,
    task_vectors,
)
from cut.pruning import Pruning
from cut.schedules import OneShot
from tests.test_pruning import TASKS, build, fit

SHAPES = {"conv.weight": (4, 3, 3, 3), "norm.weight": (4,), "norm.running_var": (4,), "head.weight": (5, 4)}
RULES = [Average(), Arithmetic(), Ties(0.3), Ties(1.0)]


def state(seed: int, around=None, spread: float = 0.1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    if around is None:
        made = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
        made["norm.running_var"] = made["norm.running_var"].abs() + 0.1
        return made | {"norm.count": torch.tensor(7)}
    return {n: v + spread * torch.randn(v.shape, generator=g) if v.dim() else v + seed for n, v in around.items()}


START = state(0)
MODELS = {t: state(i + 1, START) for i, t in enumerate("abc")}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) and v.dtype == b[n].dtype for n, v in a.items())


def near(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(v, b[n], rtol=0, atol=1e-6) for n, v in a.items())


def named(rule) -> str:
    return type(rule).__name__ + str(getattr(rule, "share", ""))


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_scale_0_is_the_start_to_the_bit(rule):
    assert same(merge(START, MODELS, rule, 0.0), START)
    assert same(merge(START, MODELS, rule, 0.0, ["norm.running_var"]), START)


@pytest.mark.parametrize("rule", [Average(), Arithmetic(), Ties(1.0)], ids=named)
def test_one_model_alone_is_itself_at_scale_1(rule):
    alone = merge(START, {"a": MODELS["a"]}, rule)
    assert near(alone, MODELS["a"] | {"norm.count": START["norm.count"]})
    assert near(merge(START, {"a": MODELS["a"]}, rule, 1.0, ["norm.running_var"]), alone)


@pytest.mark.parametrize("rule", [Average(), Ties(1.0)], ids=named)
def test_identical_models_merge_to_the_model(rule):
    again = dict.fromkeys("xyz", MODELS["b"])
    assert near(merge(START, again, rule), MODELS["b"] | {"norm.count": START["norm.count"]})


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_order_of_the_models_does_not_matter_and_nothing_given_changes(rule):
    before = {n: v.clone() for n, v in START.items()}
    turned = dict(reversed(MODELS.items()))
    assert near(merge(START, MODELS, rule, 0.7), merge(START, turned, rule, 0.7))
    assert same(before, START)


def test_the_average_and_the_sum_are_the_formulas():
    for name in SHAPES:
        numbers = {t: m[name].double().numpy() for t, m in MODELS.items()}
        base = START[name].double().numpy()
        average, total = merge(START, MODELS, Average())[name], merge(START, MODELS, Arithmetic(), 0.3)[name]
        assert np.allclose(average.numpy(), sum(numbers.values()) / 3, atol=1e-6)
        assert np.allclose(total.numpy(), base + 0.3 * sum(v - base for v in numbers.values()), atol=1e-6)


def naive_ties(start, models, scale, share):
    """Entry by entry, in lists."""
    names = [n for n in start if start[n].is_floating_point()]
    vectors = []
    for model in models.values():
        flat = [
            float(model[n].double().flatten()[i] - start[n].double().flatten()[i])
            for n in names
            for i in range(start[n].numel())
        ]
        keep = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[: max(1, round(share * len(flat)))]
        vectors.append([v if i in set(keep) else 0.0 for i, v in enumerate(flat)])
    merged = []
    for entries in zip(*vectors, strict=True):
        total = sum(entries)
        sign = (total > 0) - (total < 0)
        agreeing = [v for v in entries if v and (v > 0) - (v < 0) == sign]
        merged.append(sum(agreeing) / len(agreeing) if sign and agreeing else 0.0)
    result, at = {}, 0
    for n in names:
        size = start[n].numel()
        change = np.array(merged[at : at + size]).reshape(tuple(start[n].shape))
        result[n], at = start[n].double().numpy() + scale * change, at + size
    return result


@pytest.mark.parametrize("share", [0.1, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_ties_is_that_of_a_naive_loop(share, scale):
    found, expected = merge(START, MODELS, Ties(share), scale), naive_ties(START, MODELS, scale, share)
    for name, value in expected.items():
        assert np.allclose(found[name].numpy(), value, atol=1e-6), name


def test_ties_keeps_agreeing_signs_only_and_nothing_where_they_cancel():
    vectors = {"a": {"w": torch.tensor([3.0, 1.0, -2.0, 1.0])}, "b": {"w": torch.tensor([1.0, -3.0, 2.0, 0.0])}}
    assert Ties(1.0)(vectors)["w"].tolist() == [2.0, -3.0, 0.0, 1.0]
    assert Ties(0.5)(vectors)["w"].tolist() == [3.0, -3.0, 0.0, 0.0]


def test_statistics_stay_between_start_and_models():
    models = {t: {**m, "norm.running_var": START["norm.running_var"] * 0.2} for t, m in MODELS.items()}
    assert (merge(START, models, Arithmetic())["norm.running_var"] < 0).all(), "a sum of changes makes them negative"
    found = merge(START, models, Arithmetic(), 1.0, ["norm.running_var"])
    assert torch.allclose(found["norm.running_var"], START["norm.running_var"] * 0.2)
    assert (merge(START, models, Arithmetic(), 3.0, ["norm.running_var"])["norm.running_var"] > 0).all()


def test_other_networks_and_other_starts_are_refused():
    other = {n: v for n, v in MODELS["a"].items() if n != "head.weight"}
    with pytest.raises(ValueError, match=r"'z' is of another network.*'head\.weight'"):
        merge(START, {"z": other}, Average())
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(5, 5\), not \(5, 4\)"):
        task_vectors(START, {"z": {**MODELS["a"], "head.weight": torch.zeros(5, 5)}})
    assert same(common_start({"a": START, "b": {n: v.clone() for n, v in START.items()}}), START)
    moved = {**START, "norm.weight": START["norm.weight"] + 1e-6}
    with pytest.raises(ValueError, match=r"'a' and 'b' did not start from the same weights: 'norm\.weight'"):
        common_start({"a": START, "b": moved})
    with pytest.raises(ValueError, match="the start of 'b' is of another network"):
        common_start({"a": START, "b": other})
    for call in (lambda: common_start({}), lambda: merge(START, {}, Average())):
        with pytest.raises(ValueError, match="no models"):
            call()


def test_wrong_numbers_are_refused():
    for scale in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            merge(START, MODELS, Average(), scale)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share"):
            Ties(share)
    with pytest.raises(ValueError, match="averaged"):
        merge(START, MODELS, Average(), 1.0, ["nothing"])


def test_the_scale_of_the_best_quality_is_chosen():
    def merged(scale):
        return merge(START, MODELS, Average(), scale)

    target = merged(0.5)

    def quality(found):
        return -sum(float((v - target[n]).double().pow(2).sum()) for n, v in found.items())

    scale, found = choose_scale(merged, quality, (1.0, 0.5, 0.1))
    assert scale == 0.5 and same(found, target)
    assert choose_scale(merged, lambda s: 1.0, (0.7, 0.2))[0] == 0.2, "the smallest of equally good ones"
    nan_at_1 = {0.1: 0.0, 0.5: 1.0, 1.0: math.nan}
    assert (
        choose_scale(lambda s: {"s": torch.tensor(s)}, lambda m: nan_at_1[round(float(m["s"]), 1)], nan_at_1)[0] == 0.5
    )
    with pytest.raises(ValueError, match="no scales"):
        choose_scale(merged, quality, ())
    with pytest.raises(ValueError, match="no merged model"):
        choose_scale(merged, lambda m: math.nan)


def masks(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {t: {n: torch.rand(SHAPES[n], generator=g) < 0.4 for n in ("conv.weight", "head.weight")} for t in MODELS}


def test_merge_then_cut_is_the_merged_model_under_its_own_mask():
    def cut(found):
        return {"conv.weight": found["conv.weight"].abs() > 0.5}

    found, mask = merge_then_cut(START, MODELS, Ties(), cut, 0.7)
    merged = merge(START, MODELS, Ties(), 0.7)
    assert same(mask, cut(merged)) and same(found, masked(merged, mask))
    assert (found["conv.weight"][~mask["conv.weight"]] == 0).all()


@pytest.mark.parametrize("combine", ["union", "intersection"])
def test_cut_then_merge_is_a_naive_loop(combine):
    mine = masks()
    found, mask = cut_then_merge(START, MODELS, mine, Average(), 0.7, combine)
    for name in ("conv.weight", "head.weight"):
        flat = found[name].flatten()
        for i in range(flat.numel()):
            kept = [bool(m[name].flatten()[i]) for m in mine.values()]
            stays = any(kept) if combine == "union" else all(kept)
            assert bool(mask[name].flatten()[i]) == stays
            base = float(START[name].flatten()[i])
            changes = [
                float(m[name].flatten()[i]) - base if k else 0 for m, k in zip(MODELS.values(), kept, strict=True)
            ]
            assert float(flat[i]) == pytest.approx(base + 0.7 * sum(changes) / 3 if stays else 0.0, abs=1e-6)


def test_equal_masks_make_the_order_of_cutting_and_merging_the_same():
    mine = dict.fromkeys(MODELS, masks()["a"])
    for rule in (Average(), Arithmetic()):
        first, _ = cut_then_merge(START, MODELS, mine, rule, 0.5)
        then, _ = merge_then_cut(START, MODELS, rule, lambda s: masks()["a"], 0.5)
        assert near(first, then)


def test_masks_of_other_tasks_or_networks_are_refused():
    mine = masks()
    with pytest.raises(ValueError, match="the same tasks"):
        cut_then_merge(START, MODELS, {"a": mine["a"]}, Average())
    with pytest.raises(ValueError, match="combine 'vote'"):
        combined(mine, "vote")
    with pytest.raises(ValueError, match="no masks"):
        combined({})
    with pytest.raises(ValueError, match="mask of 'b' is of another network"):
        combined({**mine, "b": {"conv.weight": mine["b"]["conv.weight"]}})
    strange = {t: {"other.weight": torch.ones(2, dtype=torch.bool)} for t in MODELS}
    with pytest.raises(ValueError, match=r"'other\.weight' is missing"):
        cut_then_merge(START, MODELS, strange, Average())


def settings(model):
    model.optimizer = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)
    return model


def test_a_training_merges_its_single_tasks_and_is_then_cut(tmp_path):
    seen = {}

    class Watched(MergedStart):
        def _merge(self, trainer, module):
            seen["models"], seen["start"] = dict(self.models), dict(self.start)
            super()._merge(trainer, module)
            seen["end"] = {n: v.clone() for n, v in module.network.state_dict().items()}

    model, data = build()
    before = {n: v.clone() for n, v in settings(model).network.state_dict().items()}
    callback = Watched(Average(), scales=(0.5,))
    pruning = Pruning(Sparsity(0.5), batches=2, schedule=OneShot(3))
    fit(model, data, [pruning, callback], tmp_path, 4)
    assert same(seen["start"], before) and list(seen["models"]) == list(TASKS)
    backbone = {n: v for n, v in before.items() if n.startswith("backbone.")}
    parts = {t: {n: m[n] for n in backbone} for t, m in seen["models"].items()}
    assert all(not torch.equal(parts["seg"][n], parts["depth"][n]) for n in backbone if n.endswith("conv1.weight"))
    expected = merge(backbone, parts, Average(), 0.5)
    assert near({n: seen["end"][n] for n in backbone}, expected)
    for task, trained in seen["models"].items():
        own = {n: v for n, v in trained.items() if n.startswith(f"heads.{task}.")}
        assert all(torch.equal(seen["end"][n], v) for n, v in own.items()), "a head is that of its own training"
        others = [n for n, p in model.network.named_parameters() if n.startswith("heads.") and n not in own]
        assert all(torch.equal(trained[n], before[n]) for n in others), "other heads do not move"
    assert pruning.mask and model.active == list(TASKS) and not callback.models


def test_models_that_are_cut_before_they_are_merged_keep_their_masks(tmp_path):
    seen = {}

    class Watched(CutThenMerge):
        def _merge(self, trainer, module):
            seen["models"], seen["masks"] = dict(self.models), dict(self.masks)
            super()._merge(trainer, module)
            seen["end"] = {n: v.clone() for n, v in module.network.state_dict().items()}

    model, data = build()
    pruning = Pruning(Sparsity(0.5), batches=2, schedule=OneShot(3), silence=False)
    fit(settings(model), data, [pruning, Watched(Average(), scales=(1.0,))], tmp_path, 4)
    assert list(seen["masks"]) == list(TASKS) and not same(*list(seen["masks"].values())[:2])
    for task, mask in seen["masks"].items():
        sizes = [m.numel() for m in mask.values()]
        assert sum(int((~m).sum()) for m in mask.values()) == round(0.5 * sum(sizes)), "the budget of its own model"
        assert all(not seen["models"][task][n][~m].any() for n, m in mask.items()), "trained under its mask"
    shared = [n for n in seen["masks"]["seg"] if n.startswith("backbone.")]
    for name in shared:
        wanted = torch.stack([m[name] for m in seen["masks"].values()]).any(0)
        assert not seen["end"][name][~wanted].any(), "what no task kept is gone"
    weights = dict(model.network.named_parameters())
    zeros = sum(int((weights[n] == 0).sum()) for n in pruning.mask if weights[n].dim() > 1)
    assert zeros >= round(0.5 * sum(weights[n].numel() for n in pruning.mask if weights[n].dim() > 1))
    with pytest.raises(ValueError, match="pruning callback beside it"):
        other, more = build()
        fit(other, more, [CutThenMerge()], tmp_path, 4)


def test_a_training_chooses_its_scale_on_validation(tmp_path):
    model, data = build()
    callback = MergedStart(scales=(0.0, 1000.0))
    fit(settings(model), data, [callback], tmp_path, 3)
    assert callback.scale == 0.0


def test_an_interrupted_plan_goes_on_to_the_same_numbers(tmp_path):
    class Half(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:  # within the second task
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    for options in ({}, {"ckpt_path": tmp_path / "half.ckpt", "weights_only": True}):
        model, data = build(dropout=0.0)
        callback = MergedStart(each=2, scales=(0.3, 1.0))
        fit(settings(model), data, [callback, *([] if options else [Half()])], tmp_path, 7, **options)
        if not options:
            end, scale = {n: v.clone() for n, v in model.state_dict().items()}, callback.scale
    assert same(end, model.state_dict()) and scale == callback.scale


def test_a_plan_that_does_not_fit_is_refused_before_the_training(tmp_path):
    for callbacks, epochs, message in (
        ([MergedStart()], 2, "training ends after 2"),
        ([MergedStart(each=2)], 5, "training ends after 5"),
        ([Pruning(Sparsity(0.5), batches=2), MergedStart()], 5, "the first cut is at epoch 0; allowed: 3 or later"),
    ):
        model, data = build()
        with pytest.raises(ValueError, match=message):
            fit(model, data, callbacks, tmp_path, epochs)
    with pytest.raises(ValueError, match="each 0"):
        MergedStart(each=0)
    with pytest.raises(ValueError, match="scales"):
        MergedStart(scales=())
