"""Label groups: disjoint classes, right labels, fixed for ever."""

import numpy as np
import pytest
import torch
from idx_files import write_sets

from cut.data import cifar, mnist
from cut.data.batch import check_batch, picture
from cut.data.labelgroups import SOURCES, LabelGroups, find, groups, select

COUNTS = {"fashion-mnist": (16, 5), "mnist": (16, 5), "both": (18, 5), "cifar100": (15, 5)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return root, write_sets(root, 6)


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("source", SOURCES)
def test_unseen_tasks_share_no_class_with_the_library(source, seed):
    found = groups(source, seed)
    assert (len(found.library), len(found.unseen)) == COUNTS[source]
    library = {c for g in found.library for c in g.classes}
    unseen = {c for g in found.unseen for c in g.classes}
    assert not library & unseen
    assert library <= set(found.base.classes) and not unseen & set(found.base.classes)
    assert len({g.name for g in found}) == len({frozenset(g.classes) for g in found}) == len(list(found))
    for each in found:
        assert len(set(each.classes)) == len(each.classes) >= 3 and not set(each.name) & set("./ ")
        assert each is found.base or len({name for name, _ in each.classes}) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_a_name_means_one_group(source):
    assert groups(source) == groups(source)
    assert all(find(g.name) == g for g in groups(source))
    assert groups(source, 1) != groups(source, 2)
    with pytest.raises(ValueError, match=r"no label group 'fashion-99'; allowed: fashion-0, .*cifar-base"):
        find("fashion-99")
    with pytest.raises(ValueError, match="source 'emnist'; allowed: fashion-mnist, mnist, both, cifar100"):
        groups("emnist")


def test_the_groups_of_seed_0_are_fixed_for_ever():
    def classes(name):
        return " ".join(title for _, title in find(name).classes)

    assert classes("fashion-base") == "pullover bag coat ankle boot trouser shirt"
    assert classes("fashion-new-4") == "sneaker dress t-shirt sandal"
    assert classes("mnist-base") == "two eight four nine one six"
    assert classes("mnist-new-1") == "seven zero five"
    assert classes("fashion-15") == "coat trouser shirt"
    assert classes("cifar-new-0") == "camel cattle chimpanzee elephant kangaroo"


@pytest.mark.parametrize("name", ["fashion-2", "mnist-new-4", "both-base"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pictures_are_those_of_the_groups_classes(name, split, sets):
    root, written = sets
    group = find(name)
    pictures, labels = select(group, split, None, root)
    found = [(p.tobytes(), group.classes[label]) for p, label in zip(pictures, labels, strict=True)]
    expected = []
    for where in dict.fromkeys(where for where, _ in group.classes):
        of = mnist.GREY_SETS[where]
        every, classes = written[where]["test" if split == "test" else "train"]
        held = {p.tobytes() for p in mnist.read(of, "val", root)[0]}
        for p, c in zip(every, classes, strict=True):
            pair = (where, of.classes[c])
            if pair in group.classes and (split == "test" or (p.tobytes() in held) == (split == "val")):
                expected.append((p.tobytes(), pair))
    assert sorted(found) == sorted(expected)


def test_fewer_pictures_are_the_first_of_each_class(sets):
    root, _ = sets
    group = find("fashion-0")
    every, labels = select(group, "train", None, root)
    few, theirs = select(group, "train", 4, root)
    kept = np.sort(np.concatenate([(labels == c).nonzero()[0][:4] for c in range(3)]))
    assert np.array_equal(few, every[kept]) and np.array_equal(theirs, labels[kept])


def test_batches_are_as_documented(sets):
    root, _ = sets
    data = LabelGroups("mnist-new-0", root, per_class=8, held_per_class=2, batch_size=6)
    data.setup()
    (task,) = data.tasks
    assert (task.name, task.kind, task.channels, task.dense) == ("mnist-new-0", "classification", 3, False)
    assert task.classes == tuple(title for _, title in find("mnist-new-0").classes)
    assert list(task.metrics()) == ["accuracy"]
    counts = {"train": 24, "val": 6, "test": 6}
    assert data.description["splits"] == counts and data.description["group"] == "mnist-new-0"
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert batch["image"].shape[1:] == (3, 32, 32)
            check_batch(batch, data.tasks)


def test_at_their_own_size_pictures_are_the_files(sets):
    root, _ = sets
    data = LabelGroups("fashion-1", root, side=28, per_class=5)
    data.setup()
    pictures, labels = select(find("fashion-1"), "train", 5, root)
    for index, (original, label) in enumerate(zip(pictures, labels, strict=True)):
        item = data.splits["train"][0, index]
        assert np.array_equal(picture(item["image"], data.mean, data.std), np.stack([original] * 3, 2))
        assert item["fashion-1"] == label
    with pytest.raises(IndexError, match="picture 15; there are 15"):
        data.splits["train"][0, 15]


def test_the_hash_follows_group_and_pictures_only(sets):
    root, _ = sets

    def digest(group, **options):
        return LabelGroups(group, root, **options).description["hash"]

    assert digest("fashion-0") == digest("fashion-0", seed=5)
    assert len({digest("fashion-0"), digest("fashion-1"), digest("fashion-0", per_class=3)}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "shoes"}, "no label group 'shoes'"),
        ({"side": 0}, "side 0; allowed: at least 1"),
        ({"per_class": 0}, "per_class 0; allowed: None or at least 1"),
        ({"held_per_class": -1}, "held_per_class -1; allowed: None or at least 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LabelGroups(**options)


def test_missing_sets_and_classes_are_named(tmp_path):
    with pytest.raises(ValueError, match="make fashion-mnist"):
        LabelGroups("mnist-0", tmp_path).setup()
    with pytest.raises(ValueError, match="put the binary version of CIFAR-100 there"):
        LabelGroups("cifar-0", tmp_path).setup()


def write_cifar(root):
    """100 classes, 20 training pictures and one test picture each, byte by byte; returns them by file."""
    (root / cifar.FOLDER).mkdir(parents=True)
    random, written = np.random.default_rng(0), {}
    for file, each in (("train", 20), ("test", 1)):
        written[file] = []
        content = bytearray()
        for number in range(100 * each):
            label = number % 100
            name = cifar.CLASSES[label]
            (superclass,) = [i for i, names in enumerate(cifar.SUPERCLASSES.values()) if name in names]
            planes = random.integers(0, 256, (3, 32, 32), dtype=np.uint8)
            content += bytes([superclass, label]) + planes.tobytes()
            written[file].append((np.stack(list(planes), 2), name))
        (root / cifar.FOLDER / f"{file}.bin").write_bytes(content)
    return written


def test_cifar_by_superclass(tmp_path):
    written = write_cifar(tmp_path)
    assert len(set(cifar.CLASSES)) == 100 and len(cifar.SUPERCLASSES) == 20
    assert list(cifar.SUPERCLASSES) == sorted(cifar.SUPERCLASSES)
    data = LabelGroups("cifar-3", tmp_path, held_per_class=None)
    data.setup()
    names = [title for _, title in data.group.classes]
    expected = [(p, names.index(name)) for p, name in written["test"] if name in names]
    assert len(data.splits["test"]) == 5
    for index, (original, label) in enumerate(expected):
        item = data.splits["test"][0, index]
        assert np.array_equal(picture(item["image"], data.mean, data.std), original)
        assert torch.equal(item["cifar-3"], torch.tensor(label))
    assert len(data.splits["train"]) + len(data.splits["val"]) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "expected a multiple of 3074"),
        (lambda content: b"", "0 bytes"),
        (lambda content: b"\x07" + content[1:], "picture 0 has superclass 7, class 0"),
        (lambda content: content[:3075] + b"\xc8" + content[3076:], "picture 1 has superclass 1, class 200"),
    ],
)
def test_damaged_cifar_is_named(change, message, tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / cifar.FOLDER / "test.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        cifar.read("test", tmp_path)
    assert str(path) in str(caught.value)
