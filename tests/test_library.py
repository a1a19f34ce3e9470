"""The mask library: what is added comes back to the bit; another base, damage and foreign files are refused."""

import json
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from torch import nn

from cut import modelfile
from cut.fusion import percentiles
from cut.library import LEVELS, Library, base_hash, check_base, shared_weights
from tests.newcomers import setting
from tests.test_hostile_files import rewrite

SHAPES = {"a.weight": (5, 3, 3, 3), "b.weight": (7, 5)}
FACTS = {"task": "seg", "units": "weights", "base": "0123456789abcdef"}


def mask_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=g) < 0.4 for n, s in SHAPES.items()}


def scores_of(seed=0, more=11):
    g = torch.Generator().manual_seed(seed)
    return {**{n: torch.rand(s, generator=g) for n, s in SHAPES.items()}, "head.weight": torch.rand(more, generator=g)}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Conv2d(3, 5, 3), "b": nn.Linear(5, 7)})


def test_mask_and_ranks_come_back_as_they_were(tmp_path):
    library, mask, scores = Library(tmp_path / "new" / "library"), mask_of(), scores_of()
    name = library.add(mask, {**FACTS, "metric": {"miou": 0.3}, "budget": {"macs": 0.5}}, scores)
    entry = Library(library.folder).read(name)
    assert list(entry.mask) == list(SHAPES) and all(torch.equal(entry.mask[n], mask[n]) for n in mask)
    expected = percentiles(scores)
    assert set(entry.ranks) == set(SHAPES), "the head's ranks are not the library's"
    assert all(torch.equal(entry.ranks[n], expected[n]) for n in SHAPES), "exact: few weights"
    assert entry.facts["metric"] == {"miou": 0.3} and entry.facts["budget"] == {"macs": 0.5}
    kept = sum(int(m.sum()) for m in mask.values())
    assert entry.density == kept / sum(m.numel() for m in mask.values())
    assert entry.facts["sparsity"] == pytest.approx(1 - entry.density)


def test_ranks_of_many_weights_are_rounded_up_to_their_steps(tmp_path):
    mask = {"w": torch.rand(500, 200) < 0.5}
    scores = {"w": torch.rand(500, 200)}
    entry = Library(tmp_path).read(Library(tmp_path).add(mask, FACTS, scores))
    exact = percentiles(scores)["w"].numpy()
    found = entry.ranks["w"].numpy()
    assert np.abs(found - exact).max() <= 1 / LEVELS and (found >= exact - 1e-12).all()
    order = np.argsort(exact.ravel(), kind="stable")
    assert (np.diff(found.ravel()[order]) >= 0).all(), "the order is kept, up to ties"


def test_a_bit_a_weight_and_two_bytes_a_rank(tmp_path):
    mask = {"w": torch.rand(400, 1000) < 0.5}
    for scores, per_weight in ((None, 1 / 8), ({"w": torch.rand(400, 1000)}, 1 / 8 + 2)):
        library = Library(tmp_path / str(per_weight))
        folder = library.folder / library.add(mask, FACTS, scores)
        assert sum(p.stat().st_size for p in folder.iterdir()) == pytest.approx(400_000 * per_weight, rel=0.05)


def test_one_task_may_have_several_entries_of_different_names(tmp_path):
    library = Library(tmp_path)
    names = [library.add(mask_of(seed), FACTS) for seed in (0, 0, 1)]
    names.append(library.add(mask_of(2), {**FACTS, "task": "../a b/ü"}))
    assert len(set(names)) == 4 and set(library.names()) == set(names)
    assert {e.name for e in library.entries()} == set(names)
    first, second, third = (library.read(n).digest for n in names[:3])
    assert first == second != third, "content tells entries apart, names do not"
    assert all(p.parent == tmp_path for p in tmp_path.iterdir())


def test_a_mask_of_another_base_is_refused_with_both_hashes(tmp_path):
    library = Library(tmp_path)
    library.add(mask_of(), FACTS)
    with pytest.raises(ValueError, match=r"fedcba9876543210.*0123456789abcdef"):
        library.add(mask_of(), {**FACTS, "base": "fedcba9876543210"})
    assert len(library.names()) == 1
    with pytest.raises(ValueError, match="another pre-trained model"):
        check_base(network(), library.entries())
    wanted = base_hash(network(), SHAPES)
    own = Library(tmp_path / "own")
    own.add(mask_of(), {**FACTS, "base": wanted})
    check_base(network(), own.entries())
    with pytest.raises(ValueError, match=f"{base_hash(network(1), SHAPES)}.*{wanted}|{wanted}.*"):
        check_base(network(1), own.entries())


def test_tasks_that_use_different_parts_of_one_base_share_a_library(tmp_path):
    library, base = Library(tmp_path), network()
    mask = mask_of()
    told = {**FACTS, "base": base_hash(base, SHAPES)}
    for part in (mask, {"a.weight": mask["a.weight"]}, {"b.weight": mask["b.weight"]}):
        library.add(part, told, names=SHAPES)
    check_base(base, library.entries())
    with torch.no_grad():
        base["b"].weight.mul_(2)
    with pytest.raises(ValueError, match="another pre-trained model"):
        check_base(base, [e for e in library.entries() if list(e.mask) == ["a.weight"]])
    with pytest.raises(ValueError, match=r"'b\.weight', which is not a shared weight"):
        library.add(mask, told, names=["a.weight"])


def test_base_hash_sees_every_number_and_name_but_not_their_order():
    base = network()
    found = base_hash(base, SHAPES)
    assert found == base_hash(base, reversed(list(SHAPES))) == base_hash(network(), SHAPES)
    assert found != base_hash(base, ["a.weight"])
    with torch.no_grad():
        base["a"].bias.add_(1)
        assert found == base_hash(base, SHAPES), "what no mask is over does not count"
        base["b"].weight[6, 4] += 1e-6
    assert found != base_hash(base, SHAPES)
    with pytest.raises(ValueError, match=r"c\.weight"):
        base_hash(base, ["c.weight"])


def test_shared_weights_are_those_of_more_than_one_task():
    s = setting()
    assert "stem.weight" in s.shared and not [n for n in s.shared if n.startswith(("heads", "classify", "scene"))]
    with pytest.raises(ValueError, match="share no weight"):
        shared_weights(s.model, s.batches[0], {"scene": s.losses["scene"]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": ""}, "'task' is missing"),
        ({"units": "filters"}, "allowed: 'weights', 'channels'"),
        ({"base": None}, "'base'"),
        ({"tasks": "seg"}, "'tasks'"),
        ({"tasks": [1]}, "'tasks'"),
        ({"metric": {"miou": float("nan")}}, "JSON"),
        ({"data": {"x": object()}}, "JSON"),
        ({"colour": "red"}, "unknown fact 'colour'"),
    ],
)
def test_wrong_facts_are_refused_before_anything_is_written(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        Library(tmp_path / "library").add(mask_of(), {**FACTS, **change})
    assert not (tmp_path / "library").exists()


@pytest.mark.parametrize(
    ("mask", "scores", "said"),
    [
        ({}, None, "no weights"),
        ({"a.weight": torch.ones(2)}, None, "float32"),
        (mask_of(), {"a.weight": torch.ones(5, 3, 3, 3)}, "b.weight"),
        (mask_of(), {**scores_of(), "a.weight": torch.ones(4)}, "a.weight"),
        (mask_of(), {**scores_of(), "head.weight": torch.tensor([float("inf")])}, "not finite"),
    ],
)
def test_wrong_masks_and_scores_are_refused(tmp_path, mask, scores, said):
    with pytest.raises(ValueError, match=said):
        Library(tmp_path / "library").add(mask, FACTS, scores)
    assert not (tmp_path / "library").exists()


def test_an_empty_library_and_an_unknown_entry_are_told(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        assert Library(folder).names() == []
        with pytest.raises(ValueError, match=r"empty.*add"):
            Library(folder).entries()
    library = Library(tmp_path)
    library.add(mask_of(), FACTS)
    for name in ("seg", "", "..", "../library", "/etc/passwd", "."):
        with pytest.raises(ValueError, match="no entry"):
            library.read(name)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "half").mkdir()
    assert len(library.entries()) == 1, "other files and half-written entries are left alone"


# ------------------------------------------------------------------------------------------------- hostile files


@pytest.fixture
def entry(tmp_path):
    library = Library(tmp_path / "library")
    return library, library.add(mask_of(), FACTS, scores_of())


def refused(library, name):
    with pytest.raises(ValueError) as error:
        library.read(name)
    assert name in str(error.value) or str(library.folder) in str(error.value), "the message names the file"


def test_every_flipped_bit_and_every_truncation_is_refused(entry):
    library, name = entry
    rng = random.Random(0)
    for file in (modelfile.SPEC, modelfile.TENSORS):
        path = library.folder / name / file
        good = path.read_bytes()
        for _ in range(40):
            at = rng.randrange(len(good))
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            try:
                same = library.read(name).digest
            except ValueError as error:
                assert str(library.folder) in str(error)
            else:  # a bit in the white space of the description
                path.write_bytes(good)
                assert same == library.read(name).digest
        for size in (0, 1, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            refused(library, name)
        path.write_bytes(good)
    library.read(name)


FORGED = {
    "no kind": lambda s: s.pop("kind"),
    "kind of a model": lambda s: s.update(kind="multitasknet"),
    "no shapes": lambda s: s.pop("shapes"),
    "shapes empty": lambda s: s.update(shapes={}),
    "shapes a list": lambda s: s.update(shapes=[1]),
    "shape negative": lambda s: s["shapes"].update({"b.weight": [-7, 5]}),
    "shape too large": lambda s: s["shapes"].update({"b.weight": [1 << 60, 5]}),
    "shape of text": lambda s: s["shapes"].update({"b.weight": "75"}),
    "shape other": lambda s: s["shapes"].update({"b.weight": [7, 6]}),
    "shape turned": lambda s: s["shapes"].update({"b.weight": [5, 7]}),
    "shape true": lambda s: s["shapes"].update({"b.weight": [True, 35]}),
    "one shape more": lambda s: s["shapes"].update({"c.weight": [1]}),
    "one shape less": lambda s: s["shapes"].pop("b.weight"),
    "no names": lambda s: s.pop("names"),
    "names a text": lambda s: s.update(names="a.weight"),
    "names nested": lambda s: s.update(names=[["a.weight"]]),
    "names too few": lambda s: s.update(names=["a.weight"]),
    "no levels": lambda s: s.pop("levels"),
    "levels none": lambda s: s.update(levels=0),
    "levels negative": lambda s: s.update(levels=-1),
    "levels huge": lambda s: s.update(levels=1 << 20),
    "levels a share": lambda s: s.update(levels=0.5),
    "levels few": lambda s: s.update(levels=3),
    "levels true": lambda s: s.update(levels=True),
    "no facts": lambda s: s.pop("facts"),
    "facts a list": lambda s: s.update(facts=[]),
    "no task": lambda s: s["facts"].pop("task"),
    "task a number": lambda s: s["facts"].update(task=3),
    "units other": lambda s: s["facts"].update(units="layers"),
    "no base": lambda s: s["facts"].pop("base"),
    "base a number": lambda s: s["facts"].update(base=1),
    "sparsity 2": lambda s: s["facts"].update(sparsity=2),
    "sparsity text": lambda s: s["facts"].update(sparsity="0.9"),
    "fact unknown": lambda s: s["facts"].update(code="import os"),
    "fact missing": lambda s: s["facts"].pop("metric"),
    "metric a list": lambda s: s["facts"].update(metric=[1]),
    "tasks nested": lambda s: s["facts"].update(tasks=[["seg"]]),
    "tensors none": lambda s: s.update(tensors={}),
    "tensors a list": lambda s: s.update(tensors=[]),
    "dtype float": lambda s: s["tensors"]["mask/b.weight"].update(dtype="float32"),
    "dtype unknown": lambda s: s["tensors"]["mask/b.weight"].update(dtype="object"),
    "sparse": lambda s: s["tensors"]["mask/b.weight"].update(sparse=True),
    "bits fewer": lambda s: s["tensors"]["mask/b.weight"].update(shape=[4]),
    "ranks fewer": lambda s: s["tensors"]["ranks/b.weight"].update(shape=[7, 4]),
    "a tensor more": lambda s: s["tensors"].update({"x": {"shape": [1], "dtype": "uint8", "sparse": False}}),
    "a tensor less": lambda s: s["tensors"].pop("ranks/b.weight"),
    "format": lambda s: s.update(tensors_bytes=7),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_description_with_a_fitting_digest_is_refused(how, entry):
    library, name = entry
    rewrite(library.folder / name, FORGED[how])
    refused(library, name)


def test_bits_and_ranks_out_of_range_are_refused_though_all_digests_fit(entry):
    library, name = entry
    folder = library.folder / name
    good = (folder / modelfile.TENSORS).read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])

    def write(tensor, at, value):
        start = 8 + size + header[tensor]["data_offsets"][0] + at
        rewrite(folder, tensors=good[:start] + value + good[start + len(value) :])

    write("mask/b.weight", 4, b"\xff")  # 35 weights: the last 5 bits are of none
    refused(library, name)
    for place in (0, 182, 65535):  # 181 weights are ranked
        write("ranks/b.weight", 10, struct.pack("<H", place))
        refused(library, name)
    write("ranks/b.weight", 10, struct.pack("<H", 181))
    assert float(library.read(name).ranks["b.weight"][1, 0]) == 1.0


def test_a_model_or_anything_else_in_the_folder_is_no_entry(entry, tmp_path):
    library, name = entry
    modelfile.write(library.folder / "model", {"kind": "foreign"}, {"w": torch.ones(3)}, None)
    with pytest.raises(ValueError, match="holds no mask"):
        library.entries()
    shutil.rmtree(library.folder / "model")
    (library.folder / name / modelfile.TENSORS).unlink()
    refused(library, name)
