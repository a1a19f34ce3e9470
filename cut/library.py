"""Library: the masks of tasks that were cut from one pre-trained model, kept for tasks that are still to come.

An entry is a folder with a description (JSON) and tensors (safetensors), written and checked as a model's file is
(:mod:`cut.modelfile`): nothing in it is code. It holds the mask of the part that the tasks share, one bit a weight,
and, if they are given, the task's percentile ranks of the same weights in 16 bits. All entries of a library are of one
pre-trained model, told by a hash of the weights that the masks are over.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss, owners, prunable
from cut.fusion import percentiles
from cut.modelfile import SPEC, is_shape, read_spec, read_tensors, write
from cut.scores import Scores
from cut.selection import Mask

KIND = "task mask"
LEVELS = (1 << 16) - 1  # of a rank; with at most so many weights a rank is exact
UNITS = ("weights", "channels")
_MASK, _RANKS = "mask/", "ranks/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,99}")
# Every fact with its type and, where one is allowed to leave it out, what it then is.
_FACTS: dict[str, tuple[tuple[type, ...], Any]] = {
    "task": ((str,), ...),
    "units": ((str,), ...),
    "base": ((str,), ...),
    "tasks": ((list,), []),
    "budget": ((str, dict), ""),
    "score": ((str,), ""),
    "metric": ((dict,), {}),
    "data": ((dict,), {}),
    "commit": ((str,), ""),
    "sparsity": ((int, float), 0.0),
}


def base_hash(network: nn.Module, names: Iterable[str]) -> str:
    """What tells pre-trained models apart: 16 hexadecimal digits of a hash of some weights' names and bytes.

    Args:
        network: The pre-trained network, before any cut.
        names: Weights of the shared part, those that the masks are over; their order does not matter.

    Raises:
        ValueError: If the network lacks one of them; the message names it.
    """
    parameters = dict(network.named_parameters())
    found = hashlib.sha256()
    for name in sorted(set(names)):
        if name not in parameters:
            raise ValueError(f"the mask is of another model: it names {name!r}, which this model lacks")
        value = parameters[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def shared_weights(model: nn.Module, batch: Any, losses: Mapping[str, Loss], inputs: Inputs | None = None) -> list[str]:
    """Names of the Conv and Linear weights that more than one task of the model uses: what a library's masks are over.

    Args:
        model: The model with all its heads running.
        batch: One batch.
        losses: Losses of all its tasks.
        inputs: How to get the network's input from a batch.

    Raises:
        ValueError: If the model's tasks share no weight.
    """
    used = owners(model, batch, losses, list(losses), inputs)
    shared = [n for n in prunable(model) if sum(n in u for u in used.values()) > 1]
    if not shared:
        raise ValueError(f"the tasks {sorted(losses)} share no weight; a library's masks are over what tasks share")
    return shared


@dataclass(frozen=True)
class Entry:
    """One task's mask, as the library holds it.

    Attributes:
        name: Of the entry, unique in its library.
        facts: task, tasks, units, budget, sparsity, score, metric, data, commit and base, see :meth:`Library.add`.
        mask: Name of a shared weight to bool of its shape, True = kept.
        places: The same names to the place of each weight among all that the task uses, as the bits of 16-bit numbers
            from 1 = best to ``levels``; None if the scores were not kept.
        levels: Number of places; 0 if there are none.
        names: Of all shared weights of the base, which its hash is over; the mask's are some of them.
    """

    name: str
    facts: dict[str, Any]
    mask: Mask
    places: Mapping[str, Tensor] | None = None
    levels: int = 0
    names: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The task that the mask was cut for."""
        return str(self.facts["task"])

    @property
    def units(self) -> str:
        """What was cut: ``"weights"`` or ``"channels"``."""
        return str(self.facts["units"])

    @cached_property
    def density(self) -> float:
        """The share of the shared weights that stays."""
        return _kept(self.mask) / max(1, sum(m.numel() for m in self.mask.values()))

    @property
    def ranks(self) -> Scores | None:
        """Name to the percentile of each weight among all that the task uses, float64 in (0, 1], small = good."""
        if self.places is None:
            return None
        return {n: _numbers(p).double() / self.levels for n, p in self.places.items()}

    @cached_property
    def digest(self) -> str:
        """A hash of what the entry holds, without its name: what tells entries apart whatever they are called."""
        found = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name in sorted(self.mask):
            found.update(name.encode() + np.packbits(self.mask[name].cpu().numpy()).tobytes())
            if self.places is not None:
                found.update(self.places[name].cpu().numpy().tobytes())
        return found.hexdigest()


class Library:
    """A folder of task masks over one pre-trained model.

    Args:
        folder: Where it is; it need not exist before the first entry is added.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """Names of the entries, sorted."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if (p / SPEC).is_file() and _NAME.fullmatch(p.name))

    def entries(self) -> list[Entry]:
        """All entries.

        Raises:
            ValueError: If the library is empty, a file is damaged, or an entry is of another base than the first.
        """
        found = [self.read(name) for name in self.names()]
        if not found:
            raise ValueError(f"the library {self.folder} is empty: add the masks of some tasks first")
        for entry in found[1:]:
            _same_base(found[0].facts["base"], entry.facts["base"], f"entry {entry.name} of {self.folder}")
        return found

    def read(self, name: str) -> Entry:
        """One entry, checked before any tensor is read.

        Raises:
            ValueError: If there is none of that name, or it is damaged or something else; the message names the file.
        """
        folder = self.folder / name
        if not _NAME.fullmatch(name) or not (folder / SPEC).is_file():
            raise ValueError(f"no entry {name!r} in the library {self.folder}; it has {self.names()}")
        spec = read_spec(folder)
        _check_spec(spec, folder)
        tensors = read_tensors(folder, spec)
        mask, places = {}, {}
        for weight, shape in spec["shapes"].items():
            count = math.prod(shape)
            bits = np.unpackbits(tensors[_MASK + weight].numpy())
            if bits[count:].any():
                raise ValueError(f"{folder} is damaged: the mask of {weight!r} has more bits than weights")
            mask[weight] = torch.from_numpy(bits[:count].astype(bool)).view(shape)
            if spec["levels"]:
                stored = tensors[_RANKS + weight]
                numbers = stored.numpy().view(np.uint16)
                if count and not 1 <= int(numbers.min()) <= int(numbers.max()) <= spec["levels"]:
                    raise ValueError(f"{folder} is damaged: a rank of {weight!r} is not within 1 to {spec['levels']}")
                places[weight] = stored
        found = places if spec["levels"] else None
        return Entry(name, spec["facts"], mask, found, spec["levels"], tuple(spec["names"]))

    def add(
        self,
        mask: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        scores: Scores | None = None,
        names: Iterable[str] | None = None,
    ) -> str:
        """Keep a task's mask; the same task may be kept more than once.

        Args:
            mask: Name of a shared weight that the task uses to bool, True = kept. What tasks do not share has no place
                in it, see :func:`shared_weights`.
            facts: ``task``, ``units`` (``"weights"`` or ``"channels"``) and ``base`` (:func:`base_hash` of the
                pre-trained network over ``names``) are needed; ``tasks``, ``budget`` (text or dict), ``score``,
                ``metric``, ``data`` and ``commit`` may be given. The sparsity is counted.
            scores: The task's scores of *all* weights that it uses, its head's included. Kept are the shared weights'
                places among them: exact with up to 65,535 weights, else rounded to so many steps.
            names: All shared weights of the base; default: those of the mask.

        Returns:
            The entry's name.

        Raises:
            ValueError: For a wrong fact, no weights, a tensor that is no mask, scores that do not fit, or another base
                than the library's (the message holds both hashes).
            OSError: If it cannot be written; nothing of it is left then.
        """
        from cut.records import commit  # brings pandas, which who only loads a model need not have

        kept = {n: m.detach().cpu() for n, m in sorted(mask.items())}
        names = sorted(set(kept if names is None else names))
        _check_mask(kept, names)
        facts = {"tasks": [facts.get("task", "")], "commit": commit()[0], **facts}
        facts["sparsity"] = 1 - _kept(kept) / sum(m.numel() for m in kept.values())
        filled = _filled_facts(facts)
        for name in self.names()[:1]:
            theirs = read_spec(self.folder / name).get("facts", {}).get("base")
            _same_base(theirs, filled["base"], f"the new mask of task {filled['task']!r} for {self.folder}")
        tensors = {_MASK + n: torch.from_numpy(np.packbits(m.numpy())) for n, m in kept.items()}
        levels = 0
        if scores is not None:
            levels, ranks = _stored_ranks(scores, kept)
            tensors |= {_RANKS + n: r for n, r in ranks.items()}
        name = self._free_name(filled["task"], tensors)
        shapes = {n: list(m.shape) for n, m in kept.items()}
        spec = {"kind": KIND, "facts": filled, "names": names, "shapes": shapes, "levels": levels}
        write(self.folder / name, spec, tensors, False)
        return name

    def _free_name(self, task: str, tensors: Mapping[str, Tensor]) -> str:
        """A name that no entry has: the task, digits of the content, and a number if that is there already."""
        found = hashlib.sha256()
        for key, value in tensors.items():
            found.update(key.encode() + value.numpy().tobytes())
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", task).strip("-_")[:40] or "task"
        name, number = f"{slug}-{found.hexdigest()[:8]}", 1
        while (self.folder / (unique := name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return unique


def _numbers(places: Tensor) -> Tensor:
    """16-bit numbers without a sign, int32, from their bits, which the model file keeps as signed ones."""
    return places.int() & LEVELS


def _kept(mask: Mapping[str, Tensor]) -> int:
    return sum(int(m.sum()) for m in mask.values())


def _same_base(wanted: Any, found: Any, what: str) -> None:
    """Refuse a mask of another pre-trained model."""
    if wanted != found:
        raise ValueError(f"{what} is of another pre-trained model: its base is {found}, expected {wanted}")


def check_base(network: nn.Module, entries: Sequence[Entry]) -> None:
    """Refuse entries that were not cut from this network's weights.

    Raises:
        ValueError: If the network lacks a weight, has it in another shape, or has other numbers (both hashes are in the
            message).
    """
    shapes = {n: p.shape for n, p in network.named_parameters()}
    hashes: dict[frozenset[str], str] = {}
    for entry in entries:
        names = frozenset(entry.names or entry.mask)
        if names not in hashes:
            hashes[names] = base_hash(network, names)
        wrong = [n for n in sorted(entry.mask) if entry.mask[n].shape != shapes[n]]
        if wrong:
            found, wanted = tuple(entry.mask[wrong[0]].shape), tuple(shapes[wrong[0]])
            raise ValueError(f"entry {entry.name}: {wrong[0]!r} has shape {found}, the model's has {wanted}")
        _same_base(hashes[names], entry.facts["base"], f"entry {entry.name}")


def _check_mask(mask: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Refuse what is no mask over some of the named weights."""
    strange = sorted(set(mask) - set(names))
    if strange:
        raise ValueError(f"the mask holds {strange[0]!r}, which is not a shared weight of the base")
    if not any(m.numel() for m in mask.values()):
        raise ValueError("the mask holds no weights; it needs those that the tasks share")
    wrong = [n for n, m in mask.items() if m.dtype != torch.bool]
    if wrong:
        raise ValueError(f"the mask of {wrong[0]!r} is {mask[wrong[0]].dtype}; allowed: bool")


def _filled_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with what may be left out, checked."""
    unknown = sorted(set(facts) - set(_FACTS))
    if unknown:
        raise ValueError(f"unknown fact {unknown[0]!r}; allowed: {', '.join(_FACTS)}")
    filled = {k: facts.get(k, default) for k, (_, default) in _FACTS.items()}
    for key, (types, _) in _FACTS.items():
        if filled[key] is ... or (filled[key] == "" and key in ("task", "base")):
            raise ValueError(f"the fact {key!r} is missing; needed: task, units, base")
        if isinstance(filled[key], bool) or not isinstance(filled[key], types):
            raise ValueError(f"the fact {key!r} is {filled[key]!r}; allowed: {' or '.join(t.__name__ for t in types)}")
    if filled["units"] not in UNITS:
        raise ValueError(f"the fact 'units' is {filled['units']!r}; allowed: {', '.join(map(repr, UNITS))}")
    if not all(isinstance(t, str) for t in filled["tasks"]):
        raise ValueError(f"the fact 'tasks' is {filled['tasks']!r}; allowed: a list of names")
    if not 0 <= filled["sparsity"] <= 1:
        raise ValueError(f"the fact 'sparsity' is {filled['sparsity']!r}; allowed: 0 to 1")
    try:
        return json.loads(json.dumps(filled, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the facts are not JSON-able: {error}") from error


def _stored_ranks(scores: Scores, mask: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Number of steps, and the places of the mask's weights among all scored ones, as the bits of 16-bit numbers."""
    wrong = [n for n, m in mask.items() if n not in scores or scores[n].shape != m.shape]
    if wrong:
        raise ValueError(f"the scores do not fit the mask: {wrong[0]!r} has none, or of another shape")
    bad = [n for n, s in scores.items() if not torch.isfinite(s).all()]
    if bad:
        raise ValueError(f"the score of {bad[0]!r} holds a number that is not finite")
    total = sum(s.numel() for s in scores.values())
    levels = min(total, LEVELS)
    stored = {}
    for name, q in percentiles({n: s.detach().cpu() for n, s in scores.items()}).items():
        if name in mask:
            place = (q * total).round().long()
            steps = (place * levels + total - 1) // total  # rounded up, so that none is 0
            # The model file knows no unsigned 16 bits; the same bits are stored as signed.
            stored[name] = torch.from_numpy(steps.numpy().astype(np.uint16).view(np.int16))
    return levels, stored


def _check_spec(spec: Mapping[str, Any], folder: Path) -> None:
    """Refuse a description that does not follow the schema, before any tensor is read."""
    if spec.get("kind") != KIND:
        raise ValueError(f"{folder} holds no mask of a task")
    shapes, levels = spec.get("shapes"), spec.get("levels")
    if not isinstance(shapes, dict) or not shapes or not all(is_shape(s) for s in shapes.values()):
        raise ValueError(f"{folder} is damaged: 'shapes' must map names to shapes")
    if type(levels) is not int or not 0 <= levels <= LEVELS:
        raise ValueError(f"{folder} is damaged: 'levels' is {levels!r}; allowed: 0 to {LEVELS}")
    expected = {_MASK + n: ("uint8", [-(-math.prod(s) // 8)]) for n, s in shapes.items()}
    if levels:
        expected |= {_RANKS + n: ("int16", s) for n, s in shapes.items()}
    found = {n: (e["dtype"], e["shape"]) for n, e in spec["tensors"].items() if not e["sparse"]}
    if found != expected or len(found) != len(spec["tensors"]):
        raise ValueError(f"{folder} is damaged: its tensors are not those that 'shapes' tells")
    names = spec.get("names")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not set(shapes) <= set(names):
        raise ValueError(f"{folder} is damaged: 'names' must list the base's weights, the mask's among them")
    facts = spec.get("facts")
    try:
        if not isinstance(facts, dict) or _filled_facts(facts) != facts:
            raise ValueError("some are missing")
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: its facts are not those of a mask ({error})") from error
