"""A pre-trained network with several tasks, one of which plays the new one, and library entries cut from it."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from cut.budget import Sparsity
from cut.library import Library, base_hash, shared_weights
from cut.masks import make_mask
from cut.scores import sensitivity
from cut.structured import make_unit_mask
from tests.small_networks import Cnn, Vit, trained

NETWORKS = {"cnn": Cnn, "vit": Vit}


def setting(kind: str = "cnn", seed: int = 0) -> SimpleNamespace:
    """Model, batches, losses, the new task ("scene") and the names of the shared weights."""
    torch.manual_seed(seed)
    model = trained(NETWORKS[kind](), seed)
    g = torch.Generator().manual_seed(seed + 1)
    batches = [{"image": torch.randn(4, 3, 32, 32, generator=g), "scene": torch.arange(4)} for _ in range(2)]
    with torch.no_grad():
        goals = {t: torch.randn(o.shape, generator=g) for t, o in model(batches[0]["image"]).items()}
    losses = {t: lambda out, _, goal=goal: F.l1_loss(out / out.detach().std(), goal) for t, goal in goals.items()}
    losses["scene"] = lambda out, batch: F.cross_entropy(out / out.detach().std(), batch["scene"])
    names = shared_weights(model, batches[0], losses)
    return SimpleNamespace(model=model, batches=batches, losses=losses, new="scene", shared=names)


def task_scores(s, task, seed=0):
    """The task's scores, stirred by a seed so that a task can have several masks."""
    scores = sensitivity(s.model, s.batches, s.losses, [task])[task]
    g = torch.Generator().manual_seed(seed)
    return {n: v * torch.rand(v.shape, generator=g).exp() if seed else v for n, v in scores.items()}


def task_mask(s, task, sparsity=0.7, units="weights", seed=0):
    """A mask of one task over the shared weights."""
    scores = {task: task_scores(s, task, seed)}
    maker = make_mask if units == "weights" else make_unit_mask
    mask = maker(s.model, scores, s.batches[0], s.losses, [task], budget=Sparsity(sparsity), silent=False)
    return {n: mask[n] for n in s.shared if n in mask}


def seen(s, mask):
    """The part of a mask that the new task uses."""
    used = sensitivity(s.model, s.batches[:1], s.losses, [s.new])[s.new]
    return {n: m for n, m in mask.items() if n in used}


def facts(s, task, units="weights", **more):
    return {"task": task, "units": units, "base": base_hash(s.model, s.shared), **more}


def filled(s, folder, masks, units="weights", scores=None):
    """A library with masks of tasks, in this order."""
    library = Library(folder)
    for index, (task, mask) in enumerate(masks):
        library.add(mask, facts(s, task, units), None if scores is None else scores[index], s.shared)
    return library
