"""Model files from someone who means harm, digests made to fit: refused with a ValueError, or the same outputs."""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cut import checkpoint, modelfile
from cut.attention import plain_attention
from cut.checkpoint import load, read_metadata, save
from cut.cli import main
from cut.compact import compact
from cut.cost import size_on_disk
from cut.network import MultiTaskNet, NetworkConfig
from tests.small_networks import Cnn, random_mask, silenced, trained
from tests.test_compact import image
from tests.test_structured import TASKS, halved

FORGERIES, FLIPS, HEADERS = {"foreign": 150, "own": 60}, 100, 100


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A compact foreign network: the saved folder, what builds it, an input and its outputs."""
    model = trained(Cnn())
    small = compact(model, ["seg", "scene"], silenced(model, random_mask(model, 0.9, seed=3), image()), image())
    folder = tmp_path_factory.mktemp("hostile") / "foreign"
    save(small, folder, metadata={"a": 1})
    return folder, Cnn, image(9, 2)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A network of ours, which loads without a builder."""
    model = MultiTaskNet({"seg": 4, "scene": 3}, ["scene"], NetworkConfig("resnet10t", head_width=8)).eval()
    folder = tmp_path_factory.mktemp("hostile") / "own"
    save(model, folder)
    return folder, None, image(9, 1)


def outputs(folder, builder, x):
    with torch.no_grad():
        return load(folder, builder)(x)


def refused_or_same(case, folder):
    """Whether the file was refused; else its outputs are those of the good one."""
    good, builder, x = case
    try:
        loaded = load(folder, builder)
    except ValueError as error:
        assert str(error), "an error without a message"
        return True
    with torch.no_grad():
        expected, found = outputs(good, builder, x), loaded(x)
    assert list(found) == list(expected)
    for task, value in expected.items():
        assert torch.equal(found[task], value), task
    return False


def rewrite(folder, change=None, tensors=None):
    """Change the description, the tensors' file, or both, and make every digest fit."""
    spec = json.loads((folder / modelfile.SPEC).read_text())
    if tensors is not None:
        (folder / modelfile.TENSORS).write_bytes(tensors)
        spec["tensors_bytes"], spec["tensors_sha256"] = len(tensors), hashlib.sha256(tensors).hexdigest()
    if change is not None:
        change(spec)
    spec["sha256"] = modelfile._digest(spec)
    (folder / modelfile.SPEC).write_text(json.dumps(spec))


def fresh(case, tmp_path):
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case[0], folder)
    return folder


def places(value, path=()):
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def at(spec, path):
    for key in path[:-1]:
        spec = spec[key]
    return spec, path[-1]


HARM = [
    None,
    False,
    0,
    -1,
    2**31,
    2**63,
    2**70,
    1e308,
    0.5,
    "",
    "../../../etc/passwd",
    "/etc/passwd",
    "heads/../../x",
    "os.system",
    "__import__('os').system('touch /tmp/owned')",
    "cut.network:MultiTaskNet",
    "hf_hub:someone/model",
    "local-dir:/etc",
    "\x00",
    "é" * 1000,
    [],
    [[]],
    [2**40, 2**40],
    [0],
    [-1],
    {},
    {"__class__": "os.system"},
    {"class_path": "subprocess.run", "init_args": {"args": ["id"]}},
    {"tensor": [2**33], "dtype": "float32"},
    {"dict": {"__reduce__": {"list": []}}},
]


@pytest.mark.parametrize("name", ["foreign", "own"])
def test_any_harm_in_any_place_of_the_description(name, request, tmp_path):
    """Values replaced, entries deleted, renamed and added, with digests that fit."""
    case = request.getfixturevalue(name)
    rng = random.Random(1)
    original = json.loads((case[0] / modelfile.SPEC).read_text())
    paths = [p for p in places(original) if p[0] not in ("metadata", "sha256")]
    structure = [p for p in paths if p[0] != "tensors"]
    refused = 0
    for trial in range(FORGERIES[name]):
        folder = fresh(case, tmp_path)
        path, value = rng.choice(structure if trial % 2 else paths), copy.deepcopy(rng.choice(HARM))

        def change(spec, path=path, value=value, kind=trial % 5):
            parent, key = at(spec, path)
            if kind < 3 or isinstance(parent, list):
                parent[key] = value
            elif kind == 3:
                parent[str(value)] = parent.pop(key)
            else:
                parent[f"{value}"] = value

        rewrite(folder, change)
        refused += refused_or_same(case, folder)
    assert refused > FORGERIES[name] / 2


def test_flipped_bits_and_cut_bytes_without_a_fitting_digest(foreign, tmp_path):
    rng = random.Random(2)
    refused = 0
    for trial in range(FLIPS):
        folder = fresh(foreign, tmp_path)
        path = folder / (modelfile.SPEC, modelfile.TENSORS)[trial % 2]
        data = bytearray(path.read_bytes())
        position = rng.randrange(len(data))
        if trial % 3 == 0:
            data = data[:position]
        elif trial % 3 == 1:
            data[position] ^= 1 << rng.randrange(8)
        else:
            data[position : position + 8] = rng.randbytes(8)
        path.write_bytes(bytes(data))
        refused += refused_or_same(foreign, folder)
    assert refused >= FLIPS * 0.9


def header(data):
    """A safetensors file's header and the bytes behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(entries, body, length=None):
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def test_forged_headers_of_the_tensors_file(foreign, tmp_path):
    """Offsets that overlap or leave the file, other shapes, types and names; every digest fits."""
    rng = random.Random(3)
    entries, body = header((foreign[0] / modelfile.TENSORS).read_bytes())
    names = [n for n in entries if n != "__metadata__"]
    for trial in range(HEADERS):
        folder = fresh(foreign, tmp_path)
        forged, name = copy.deepcopy(entries), rng.choice(names)
        entry = forged[name]
        kind = trial % 6
        if kind == 0:
            entry["data_offsets"] = [rng.choice([0, -1, 2**63, 2**64]), rng.choice([0, 4, len(body) + 8, 2**64])]
        elif kind == 1:
            entry["shape"] = rng.choice([[], [-1], [2**40, 2**40], [0], ["x"], None, [1] * 100])
        elif kind == 2:
            entry["dtype"] = rng.choice(["F64", "F8_E4M3", "OBJECT", "", None, 3])
        elif kind == 3:
            forged[rng.choice(["../x", "/etc/passwd", "", "\x00"])] = forged.pop(name)
        elif kind == 4:
            entry["data_offsets"] = forged[rng.choice(names)]["data_offsets"]
        else:
            forged["extra"] = {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}
        rewrite(folder, tensors=joined(forged, body))
        refused_or_same(foreign, folder)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**63, 2**64 - 1])
def test_forged_lengths_of_the_header(foreign, tmp_path, length):
    folder = fresh(foreign, tmp_path)
    rewrite(folder, tensors=joined(*header((foreign[0] / modelfile.TENSORS).read_bytes()), length=length))
    assert refused_or_same(foreign, folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95pickle", b"PK\x03\x04", b"{}", b"\x00" * 4096])
def test_another_kind_of_file_in_place_of_the_tensors(foreign, tmp_path, content):
    """A pickle above all: it is never opened as one."""
    folder = fresh(foreign, tmp_path)
    rewrite(folder, tensors=content)
    assert refused_or_same(foreign, folder)


def test_a_pickle_that_would_run_code_does_not(foreign, tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    folder = fresh(foreign, tmp_path)
    torch.save(Harm(), tmp_path / "harm.pt")
    rewrite(folder, tensors=(tmp_path / "harm.pt").read_bytes())
    assert refused_or_same(foreign, folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        "null",
        "[]",
        '"cut model 1"',
        "{" + '"format": "cut model 1", ' * 2 + '"sha256": NaN}',
        "\ufeff{}",
        "9" * 10_000,
        '{"format": "cut model 1"}',
    ],
)
def test_descriptions_that_are_none(foreign, tmp_path, text):
    folder = fresh(foreign, tmp_path)
    (folder / modelfile.SPEC).write_text(text)
    with pytest.raises(ValueError):
        load(folder, Cnn)
    with pytest.raises(ValueError):
        read_metadata(folder)


def test_bytes_that_are_no_text(foreign, tmp_path):
    folder = fresh(foreign, tmp_path)
    (folder / modelfile.SPEC).write_bytes(b"\xff\xfe\xfa" * 100)
    with pytest.raises(ValueError, match="damaged"):
        load(folder, Cnn)


@pytest.mark.parametrize("name", [modelfile.SPEC, modelfile.TENSORS])
def test_folders_pipes_and_links_in_place_of_files(foreign, tmp_path, name):
    folder = fresh(foreign, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        load(folder, Cnn)
    (folder / name).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / name)  # reading it would wait for ever
        with pytest.raises(ValueError, match="holds no model"):
            load(folder, Cnn)
        (folder / name).unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    (folder / name).symlink_to("/etc/passwd")
    assert refused_or_same(foreign, folder)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "elsewhere")  # a cache of models may be made of links
    assert not refused_or_same(foreign, folder)


LIMIT = """
import resource, sys
from cut.checkpoint import load
from tests.small_networks import Cnn
from pathlib import Path
status = Path("/proc/self/status").read_text()
used = int(status.split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for folder in sys.argv[1:]:
    try:
        load(folder, Cnn if "foreign" in folder else None)
        print(Path(folder).name, "loaded")
    except ValueError as error:
        print(Path(folder).name, "refused:", error)
"""


def with_a_gigabyte(folders):
    """What loading each of them says, by the folder's name, in a process that may take a gigabyte more."""
    command = [sys.executable, "-c", LIMIT, *map(str, folders)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert found.returncode == 0, found.stderr[-2000:]
    return dict(line.split(" ", 1) for line in found.stdout.splitlines())


def thin(folder, backbone, **options):
    """A small file that fits a large network of ours: every layer has a single channel, every attention one head."""
    with torch.device("meta"):
        model = MultiTaskNet({"seg": 4}, config=NetworkConfig(backbone, head_width=8, **options))
    sizes = {}
    for _, attention in plain_attention(model):
        sizes[attention.qkv], sizes[attention.proj] = (3 * attention.head_dim, 1), (1, attention.head_dim)
    for module in model.modules():
        resizable = isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    shape = (*sizes.get(module, (1, 1))[: t.ndim], *t.shape[2:]) if resizable else t.shape
                    value = torch.zeros(shape, dtype=t.dtype)
                    tensors[name] = nn.Parameter(value) if tensors is module._parameters else value
    save(model, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_networks_that_compute_tensors_of_their_own_take_no_more_memory_than_their_file_and_these(tmp_path):
    """EVA and Swin hold positions that no file does; dense, the one here takes 1.2 GB, the other's windows 10 GB."""
    large, windows = "eva02_large_patch14_224", "swin_tiny_patch4_window7_224"
    thin(tmp_path / "fits", large)
    thin(tmp_path / "other", "eva02_tiny_patch14_224")
    rewrite(tmp_path / "other", lambda s: s["network"]["config"].update(backbone=large))
    thin(tmp_path / "windows", windows, img_size=(224, 224))
    shutil.copytree(tmp_path / "windows", tmp_path / "many")
    rewrite(tmp_path / "many", lambda s: s["network"]["config"].update(img_size=[28672, 28672]))
    assert all(size_on_disk(f) < 3e6 for f in tmp_path.iterdir())
    said = with_a_gigabyte(sorted(tmp_path.iterdir()))
    for whole in ("fits", "windows"):  # built and filled; then layers of one channel turn out not to fit each other
        assert said[whole].startswith("refused: the model file is not valid: no picture goes through its network")
    assert "tensors" in said["other"] and "differ" in said["other"]
    assert "numbers; at most" in said["many"] or "numbers are no parameters; at most" in said["many"]


@pytest.mark.parametrize("backbone", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "levit_128s"])
def test_what_a_network_computes_for_itself_is_there_after_loading(backbone, tmp_path):
    model = MultiTaskNet({"seg": 4}, config=NetworkConfig(backbone, head_width=8)).eval()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    expected = dict(model.named_buffers())
    assert not set(expected) <= set(model.state_dict())
    for name, value in loaded.named_buffers():
        assert torch.equal(value, expected[name]), name
    assert all(p.is_contiguous() and p.requires_grad for p in loaded.parameters())
    again = MultiTaskNet({"seg": 4}, config=NetworkConfig("resnet10t", head_width=8))
    assert all(p.is_contiguous() for p in again.parameters()) and again.backbone.conv1[0].weight.std() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sizes_that_would_fill_the_memory_are_refused_before_it_is_taken(foreign, own, tmp_path):
    """A gigabyte is all that the process gets."""
    huge = 2**32
    changes = {
        "foreign-shape": lambda s: s["tensors"]["stem.weight"].update(shape=[huge, 1, 1, 1], sparse=False),
        "foreign-sparse": lambda s: s["tensors"]["stem.weight"].update(shape=[huge, 1, 1, 1], sparse=True),
        "foreign-stub": lambda s: s["stubs"].update(gate={"tensor": [huge], "dtype": "float32"}),
        "own-width": lambda s: s["network"]["config"].update(head_width=2**30),
        "own-outputs": lambda s: s["network"]["outputs"].update(seg=2**30),
        "own-size": lambda s: s["network"]["config"].update(backbone="vit_tiny_patch16_224", img_size=[2**20, 2**20]),
    }
    folders = []
    for name, change in changes.items():
        folder = tmp_path / name
        shutil.copytree(foreign[0] if name.startswith("foreign") else own[0], folder)
        rewrite(folder, change)
        folders.append(str(folder))
    said = with_a_gigabyte(folders)
    assert set(said) == set(changes) and all(words.startswith("refused") for words in said.values()), said


BARE = """
import sys

class Only:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in BLOCKED:
            return next(filter(None, (f.find_spec(name, path, target) for f in self.finders)), None)

BLOCKED = set(sys.argv[2].split(","))
sys.meta_path[:] = [Only(list(sys.meta_path))]
from cut.checkpoint import load
import torch
found = {}
for folder in sys.argv[3:]:
    with torch.no_grad():
        found[folder] = load(folder)(torch.load(folder + "/image.pt", weights_only=True))
torch.save(found, sys.argv[1])
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & BLOCKED, loaded & BLOCKED
"""


def test_compact_models_load_where_only_torch_timm_safetensors_and_cut_are(tmp_path):
    """A CNN with half of its channels and a ViT with fewer heads and neurons, each without one of its heads."""
    import tomllib

    expected = {}
    for backbone in ("resnet10t", "test_vit"):
        dense, small, image = halved(backbone)
        save(small, tmp_path / backbone)
        torch.save(image, tmp_path / backbone / "image.pt")
        with torch.no_grad():
            expected[str(tmp_path / backbone)] = small(image)
        assert set(small.heads) == set(TASKS) < set(dense.heads)
        if backbone == "resnet10t":
            convs = [(m, small.get_submodule(n)) for n, m in dense.backbone.named_modules(prefix="backbone")]
            narrower = [new.out_channels < old.out_channels for old, new in convs if isinstance(old, nn.Conv2d)]
            assert sum(narrower) > 0.9 * len(narrower)
        else:
            blocks = list(zip(dense.backbone.model.blocks, small.backbone.model.blocks, strict=True))
            assert all(new.attn.num_heads < old.attn.num_heads for old, new in blocks)
            assert all(new.mlp.fc1.out_features == old.mlp.fc1.out_features // 2 for old, new in blocks)

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    packages = {d.replace(">", "[").replace("<", "[").split("[")[0].replace("-", "_") for d in named}
    # timm stands on these itself.
    allowed = {
        "cut",
        "torch",
        "timm",
        "safetensors",
        "torchvision",
        "numpy",
        "pillow",
        "pyyaml",
    }  # cut: extras of extras
    modules = packages - allowed | {
        "pytorch_lightning",
        "lightning_fabric",
        "lightning_utilities",
        "onnx_ir",
        "torchao",
    }
    assert {"lightning", "torchmetrics", "torch_pruning", "rich", "wandb", "scipy", "pandas", "onnx"} <= modules
    subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "out.pt"), ",".join(modules), *expected],
        check=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(found) == set(expected)
    for folder, outputs_ in expected.items():
        assert set(found[folder]) == set(TASKS)
        for task, value in outputs_.items():
            torch.testing.assert_close(found[folder][task], value)


def narrower(state):
    """One layer reads fewer channels than the layer before it makes."""
    name = "backbone.layer2.0.conv1.weight"
    return {**state, name: state[name][:, :30].contiguous()}


def of_half_precision(state):
    name = "backbone.layer2.0.conv1.weight"
    return {**state, name: state[name].half()}


def whole_numbers(state):
    name = "backbone.layer2.0.conv1.weight"
    return {**state, name: state[name].to(torch.int64)}


@pytest.mark.parametrize("change", [narrower, of_half_precision, whole_numbers])
def test_tensors_that_do_not_fit_each_other_are_refused_though_all_digests_fit(own, tmp_path, change):
    folder = fresh(own, tmp_path)
    spec = modelfile.read_spec(folder)
    tensors = change(modelfile.read_tensors(folder, spec))
    told = {k: v for k, v in spec.items() if k not in ("tensors", "tensors_bytes", "tensors_sha256", "sha256")}
    modelfile.write(folder, told, tensors, sparse=None)
    with pytest.raises(ValueError, match=r"no picture goes through|does not fit the network"):
        load(folder)
    for command in (["info", str(folder)], ["export", str(folder), "--out", str(tmp_path / "x.onnx")]):
        assert main(command) == 2
    assert not (tmp_path / "x.onnx").exists()


def test_a_tensor_larger_than_the_dense_one_is_refused_before_it_takes_memory(foreign, tmp_path, monkeypatch):
    """A few zeros in a sparse tensor say that it is huge."""
    folder = fresh(foreign, tmp_path)
    spec = modelfile.read_spec(folder)
    tensors = modelfile.read_tensors(folder, spec)
    name = next(n for n, t in tensors.items() if t.ndim == 4)
    tensors[name] = torch.zeros(100, 100, 9, 9)
    told = {k: v for k, v in spec.items() if k not in ("tensors", "tensors_bytes", "tensors_sha256", "sha256")}
    modelfile.write(folder, told, tensors, sparse=True)
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="does not fit the network"):
        load(folder, foreign[1])
