import copy
import json
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from cut import modelfile
from cut.checkpoint import load, read_metadata, save
from cut.compact import compact, keep_tasks
from cut.masks import apply_mask
from cut.network import MultiTaskNet, NetworkConfig
from tests.small_networks import Cnn, Vit, random_mask, silenced, trained
from tests.test_compact import Foreign, image, inner


def on_disk(folder):
    return sum(p.stat().st_size for p in Path(folder).iterdir())


@torch.no_grad()
def assert_identical(a, b, size=(32, 32)):
    x = image(9, 3, size)
    before, after = a(x), b(x)
    assert list(before) == list(after)
    for task in before:
        assert torch.equal(before[task], after[task])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def compact_cnn(tasks=("seg", "scene"), sparsity=0.9):
    model = trained(Cnn())
    return compact(model, list(tasks), silenced(model, random_mask(model, sparsity, seed=3), image()), image())


CASES = {
    "dense": (lambda: trained(Cnn()), Cnn),
    "compact": (compact_cnn, Cnn),
    "one head": (lambda: compact_cnn(("depth",)), Cnn),
    "foreign": (lambda: keep_tasks(trained(Foreign()), ["d", "b"], image()), Foreign),
    "vit": (lambda: compact(*(m := trained(Vit()), ["scene"], random_mask(m, 0.95), image())), Vit),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sparse", [None, False, True])
def test_saved_and_loaded_is_identical(tmp_path, name, sparse):
    make, builder = CASES[name]
    model = make()
    size = save(model, tmp_path / "m", sparse=sparse, metadata={"sparsity": 0.9, 1: [None]})
    assert size == on_disk(tmp_path / "m")
    loaded = load(tmp_path / "m", builder)
    assert_identical(model, loaded)
    assert read_metadata(tmp_path / "m") == {"sparsity": 0.9, "1": [None]}
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert repr(loaded) == repr(model), "the sizes of all layers"


def test_loaded_model_can_be_trained_and_saved_again(tmp_path):
    model = compact_cnn()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", Cnn)
    sum(o.sum() for o in loaded.train()(image()).values()).backward()
    assert all(p.grad is not None for p in inner(loaded).heads.parameters())
    save(loaded.eval(), tmp_path / "a")
    assert_identical(loaded, load(tmp_path / "a", Cnn))


def test_sparse_storage_pays_and_is_exact(tmp_path):
    model = trained(Cnn(width=64))
    apply_mask(model, random_mask(model, 0.95))
    sizes = {s: save(model, tmp_path / str(s), sparse=s) for s in (None, False, True)}
    weights = sum(p.numel() for p in model.parameters())
    assert sizes[None] < 0.4 * sizes[False] and sizes[None] <= sizes[True] and sizes[False] > 4 * weights
    for key, value in load(tmp_path / "None", lambda: Cnn(width=64)).state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    dense = trained(Cnn())
    assert abs(save(dense, tmp_path / "x") - save(dense, tmp_path / "y", sparse=False)) < 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_special_values(tmp_path, dtype):
    model = nn.Linear(64, 8).to(dtype)
    with torch.no_grad():
        model.weight[1:] = 0
        model.weight[0, :3] = torch.tensor([float("nan"), float("inf"), 1e-7])
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", lambda: nn.Linear(64, 8))
    assert torch.equal(loaded.weight.isnan(), model.weight.isnan()) and loaded.weight.dtype == dtype
    assert torch.equal(loaded.weight.nan_to_num(), model.weight.nan_to_num())


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x):
        return {"t": self.b(self.a(x))}


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = Tied()
    assert save(model, tmp_path / "m") < save(Tied(tie=False), tmp_path / "n") - 4000
    for tie in (True, False):
        loaded = load(tmp_path / "m", lambda tie=tie: Tied(tie))
        assert loaded.b.weight is loaded.a.weight and torch.equal(loaded.a.weight, model.a.weight)


# --------------------------------------------------------------------------------------------- damaged files


def test_random_mutations_are_refused_or_change_nothing(tmp_path):
    model = compact_cnn()
    save(model, tmp_path / "good")
    rng = random.Random(0)
    for trial in range(60):
        folder = tmp_path / f"bad{trial}"
        shutil.copytree(tmp_path / "good", folder)
        path = folder / rng.choice([modelfile.SPEC, modelfile.TENSORS])
        data = bytearray(path.read_bytes())
        kind = trial % 3
        for _ in range(rng.choice([1, 1, 5])):
            position = rng.randrange(len(data))
            if kind == 0:
                data[position] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[position : position + rng.randrange(1, 200)]
            else:
                data[position:position] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
        path.write_bytes(bytes(data))
        try:
            loaded = load(folder, Cnn)
        except ValueError:
            continue
        assert_identical(model, loaded)


def forge(folder, change):
    """Change the description and make its digest fit again."""
    path = folder / modelfile.SPEC
    spec = json.loads(path.read_text())
    change(spec)
    spec["sha256"] = modelfile._digest(spec)
    path.write_text(json.dumps(spec))


def put(*keys, value):
    def change(spec):
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("kind", value="os.system"), "'kind'"),
        (put("network", value={"backbone": "x"}), "'network'"),
        (put("tasks", value=["seg", "seg"]), "'tasks'"),
        (put("tasks", value="seg"), "'tasks'"),
        (put("entries", value={"heads": ["seg", "pose"]}), "pose"),
        (put("entries", value={"../heads": []}), "../heads"),
        (put("entries", value={"heads": []}), "differ"),
        (put("stubs", value={"": None}), "no module"),
        (put("stubs", value={"nothing": None}), "no module"),
        (put("stubs", value={"stem": {"tensor": [1e9], "dtype": "float32"}}), "'stubs'"),
        (put("stubs", value={"stem": {"tensor": [2], "dtype": "load"}}), "'stubs'"),
        (put("aliases", value={"x": "y"}), "'aliases'"),
        (put("tensors", "stem.weight", "shape", value=[-1, 3, 3, 3]), "whole numbers"),
        (put("tensors", "stem.weight", "shape", value=[True, 3, 3, 3]), "whole numbers"),
        (put("tensors", "stem.weight", "shape", value=[1 << 20, 1 << 20, 3, 3]), "at most"),
        (put("tensors", "stem.weight", "shape", value=[5, 3, 3, 3]), "stem.weight"),
        (put("tensors", "stem.weight", "dtype", value="complex64"), "complex64"),
        (put("tensors", "stem.weight", "dtype", value="int32"), "stem.weight"),
        (put("tensors", "stem.weight", "sparse", value=True), "stem.weight"),
        (put("tensors", "extra", value={"shape": [1], "dtype": "int64", "sparse": False}), "extra"),
        (lambda spec: spec["tensors"].pop("stem.weight"), "stem.weight"),
        (lambda spec: spec.pop("stubs"), "'stubs'"),
        (put("format", value="cut model 2"), "format"),
        (put("tensors_bytes", value=1), "truncated"),
    ],
)
def test_forged_descriptions_are_refused(tmp_path, change, match):
    save(compact_cnn(), tmp_path / "m", sparse=False)
    forge(tmp_path / "m", change)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "m", Cnn)


def places(value, path=()):
    """The path of every entry in nested JSON."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_random_forgeries_are_refused_or_change_nothing(tmp_path):
    """Any value in any place, with a digest that fits: never another kind of error."""
    model = compact_cnn()
    save(model, tmp_path / "m")
    original = (tmp_path / "m" / modelfile.SPEC).read_text()
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        2**70,
        1.5,
        "",
        "heads",
        "stem.weight",
        [],
        {},
        [[]],
        {"tensor": [2], "dtype": "int8"},
    ]
    paths = [p for p in places(json.loads(original)) if p[0] != "metadata"]
    for _ in range(60):
        (tmp_path / "m" / modelfile.SPEC).write_text(original)
        forge(tmp_path / "m", put(*rng.choice(paths), value=rng.choice(values)))
        try:
            loaded = load(tmp_path / "m", Cnn)
        except ValueError:
            continue
        assert_identical(model, loaded)


def test_other_shapes_than_the_network_can_have_are_refused(tmp_path):
    save(trained(Cnn()), tmp_path / "m")
    with pytest.raises(ValueError, match="dense it is"):
        load(tmp_path / "m", lambda: Cnn(width=8))
    with pytest.raises(ValueError, match="does not fit"):
        load(tmp_path / "m", Vit)
    with pytest.raises(ValueError, match="builder"):
        load(tmp_path / "m")
    with pytest.raises(ValueError, match="holds no model"):
        load(tmp_path)


def test_channels_that_do_not_agree_are_refused(tmp_path):
    model = trained(Cnn())
    model.norm.bias = nn.Parameter(model.norm.bias[:5].clone())
    save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"norm\.bias has 5 channels"):
        load(tmp_path / "m", Cnn)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_tensors(tmp_path, size):
    save(compact_cnn(), tmp_path / "m")
    path = tmp_path / "m" / modelfile.TENSORS
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(ValueError, match="truncated"):
        load(tmp_path / "m", Cnn)


# ---------------------------------------------------------------------------------------------- failed saves


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = compact_cnn()
    save(model, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(modelfile, "save_file", disk_full)
    for folder in ("m", "new"):
        with pytest.raises(OSError, match="No space left"):
            save(trained(Cnn()), tmp_path / folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert_identical(model, load(tmp_path / "m", Cnn))
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_saved(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        save(nn.Linear(2, 2), tmp_path / "file")
    with pytest.raises(ValueError, match="JSON"):
        save(nn.Linear(2, 2), tmp_path / "m", metadata={"x": object()})
    with pytest.raises(ValueError, match="JSON"):
        save(nn.Linear(2, 2), tmp_path / "m", metadata={"x": float("nan")})
    model = nn.Linear(2, 2)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex64"):
        save(model, tmp_path / "m")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="_extra_state"):
        save(Extra(2, 2), tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


# ------------------------------------------------------------------------------------------ our own network


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("mobilenetv2_050", None), ("resnet10t", None), ("eva02_tiny_patch14_224", (28, 28))],
)
def test_multi_task_net_needs_no_builder(tmp_path, backbone, size):
    config = NetworkConfig(backbone, head_width=16, img_size=size)
    model = trained(MultiTaskNet({"seg": 4, "depth": 1, "scene": 5}, ["scene"], config))
    x = image(n=1, size=size or (64, 64))
    small = model if size else compact(model, ["scene", "depth"], random_mask(model, 0.95), x)
    save(small, tmp_path / "m")
    state = torch.get_rng_state()
    loaded = load(tmp_path / "m")
    assert isinstance(loaded, MultiTaskNet) and loaded.outputs == small.outputs
    assert size or torch.equal(torch.get_rng_state(), state)
    assert_identical(small, loaded, size or (96, 64))
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])


def small_net(tmp_path):
    model = MultiTaskNet({"seg": 4, "depth": 1}, config=NetworkConfig("mobilenetv2_050", head_width=16)).eval()
    save(model, tmp_path / "m")
    return model


def test_selection_is_kept(tmp_path):
    model = small_net(tmp_path)
    model.select(["depth"])
    save(model, tmp_path / "m")
    assert_identical(model, load(tmp_path / "m"), (64, 64))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("network", value={}), "cannot be built"),
        (put("network", "config", "backbone", value="hf_hub:someone/something"), "cannot be built"),
        (put("network", "config", "backbone", value=["x"]), "cannot be built"),
        (put("network", "config", "backbone", value="resnet10t"), "differ"),
        (put("network", "config", "head_width", value=10**9), "cannot be built"),
        (put("network", "config", "head_width", value=10**15), "cannot be built"),
        (put("network", "config", "head_width", value=-1), "cannot be built"),
        (put("network", "config", "run", value="x"), "cannot be built"),
        (put("network", "outputs", value={"../../x": 4}), "cannot be built|differ|no entries"),
        (put("network", "outputs", "seg", value=10**9), "cannot be built"),
        (put("tasks", value=["pose"]), "pose"),
    ],
)
def test_forged_networks_are_refused(tmp_path, change, match):
    small_net(tmp_path)
    forge(tmp_path / "m", change)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "m")


def test_weights_named_in_the_file_are_not_read(tmp_path):
    model = small_net(tmp_path)
    forge(tmp_path / "m", put("network", "config", "weights", value="/etc/passwd"))
    assert_identical(model, load(tmp_path / "m"), (64, 64))


def test_saving_leaves_the_model_and_later_changes_leave_the_file(tmp_path):
    model = copy.deepcopy(compact_cnn())
    before = copy.deepcopy(model)
    save(model, tmp_path / "m")
    with torch.no_grad():
        inner(model).stem.weight.zero_()
    assert_identical(before, load(tmp_path / "m", Cnn))


def test_loading_needs_neither_lightning_nor_torch_pruning(tmp_path):
    save(nn.Linear(2, 2), tmp_path / "m")
    code = (
        "import sys, torch\nfrom cut.checkpoint import load\n"
        f"load({str(tmp_path / 'm')!r}, lambda: torch.nn.Linear(2, 2))\n"
        "bad = {'lightning', 'torch_pruning', 'torchmetrics', 'torchvision'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
