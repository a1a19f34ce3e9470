import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.rooms import catalog, pack, produce
from experiments.rooms.__main__ import main
from experiments.rooms.furnish import furnish
from experiments.rooms.labels import Labels
from experiments.rooms.plan import ROOM_TYPES

EMBEDDED = Path(__file__).parents[2] / "cut/data/embedded"
TINY = produce.Settings(train=2, val=1, test=1, height=24, width=32, seed=3, samples=2)


@pytest.fixture(scope="module")
def furniture():
    try:
        return catalog.find_furniture(catalog.INSTALLED)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def models(furniture):
    return catalog.read_catalog(furniture)


@pytest.fixture(scope="module")
def renderer(furniture):
    for name in produce.NEEDED:
        pytest.importorskip(name)
    return furniture


# The set on disk


def test_normals_survive_their_bytes_to_within_one_degree():
    vectors = np.random.default_rng(0).standard_normal((20000, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    again = pack.decode_normal(pack.encode_normal(vectors))
    cosine = (vectors * again).sum(1).clip(-1, 1)
    assert np.degrees(np.arccos(cosine)).max() < 1
    assert (pack.decode_normal(pack.encode_normal(np.zeros((2, 3)))) == 0).all()


def test_depth_is_kept_to_the_millimetre_and_zero_stays_unknown():
    depth = np.array([[0.0, 0.0004, 2.34567, 99.0]])
    assert pack.encode_depth(depth).tolist() == [[0, 0, 2346, 65535]]


@pytest.mark.parametrize("shape, kind", [((7, 9), np.uint8), ((7, 9, 3), np.uint8), ((7, 9), np.uint16)])
def test_png_is_read_back_by_an_independent_reader(shape, kind):
    pixels = np.random.default_rng(1).integers(0, np.iinfo(kind).max + 1, shape).astype(kind)
    pixels[2:5] = 1000 if kind is np.uint16 else 40
    again = np.array(Image.open(io.BytesIO(pack.png(pixels))))
    assert np.array_equal(again, pixels)


def _room(name, seed=0):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((6, 8, 3))
    labels = Labels(
        rng.integers(0, 15, (6, 8)).astype(np.uint8),
        normal / np.linalg.norm(normal, axis=2, keepdims=True),
        rng.uniform(0.5, 5, (6, 8)),
    )
    entry = {"id": name, "room_type": "office", "seed": seed, "models": ["a"]}
    return pack.Room(entry, rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), labels)


def test_a_packed_set_is_read_back_and_described_by_its_meta_file(tmp_path):
    parts, out = tmp_path / "parts", tmp_path / "set"
    parts.mkdir()
    rooms = {name: _room(name, i) for i, name in enumerate(["train-00000", "train-00001", "test-00000"])}
    for room in rooms.values():
        pack.write_part(parts, room)
    meta = pack.pack(parts, out, (6, 8), seed=4)
    assert meta == json.loads((out / "meta.json").read_text())
    assert meta["splits"] == {"train": 2, "val": 0, "test": 1} and meta["size"] == [6, 8]
    for name, digest in meta["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    for again in pack.read_rooms(out):
        room = rooms[again.entry["id"]]
        assert again.entry == room.entry
        assert np.array_equal(again.labels.seg, room.labels.seg)
        assert np.abs(again.labels.depth - room.labels.depth).max() < 0.00051
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    pack.pack(parts, out, (6, 8), seed=4)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_no_rooms_to_pack_or_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no finished rooms"):
        pack.pack(tmp_path, tmp_path, (6, 8), 0)
    with pytest.raises(ValueError, match="holds no set"):
        list(pack.read_rooms(tmp_path))


# Bad input


@pytest.mark.parametrize("size", ["96", "96x", "axb", "8x8", "96x4000", "96x128x3"])
def test_an_unknown_size_is_named(size):
    with pytest.raises(ValueError, match=size):
        produce.parse_size(size)


@pytest.mark.parametrize("splits", ["dev:1", "train:-1", "train", "train:0", "train:nan", "train:x"])
def test_bad_splits_are_named(splits):
    with pytest.raises(ValueError, match=r"split"):
        produce.parse_splits(splits, 10)


def test_the_splits_use_up_all_rooms():
    for num in (1, 7, 100, 1301):
        assert sum(produce.parse_splits("train:0.75,val:0.1,test:0.15", num).values()) == num


def test_missing_archives_name_the_debian_package(tmp_path, capsys):
    with pytest.raises(ValueError, match="sweethome3d-furniture"):
        catalog.find_furniture(tmp_path)
    assert main(["render", "--out", str(tmp_path / "o"), "--furniture", str(tmp_path)]) == 2
    assert "sweethome3d-furniture" in capsys.readouterr().err


def test_a_failing_download_names_the_debian_package(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise FileNotFoundError("apt-get")

    monkeypatch.setattr(catalog, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(catalog.subprocess, "run", fail)
    with pytest.raises(ValueError, match="apt-get install sweethome3d-furniture"):
        catalog.find_furniture(cache=tmp_path)


def test_the_command_line_gives_two_for_bad_input(tmp_path, capsys):
    assert main(["render", "--out", str(tmp_path), "--size", "huge"]) == 2
    assert main(["render", "--out", str(tmp_path), "--num", "0"]) == 2
    assert main(["check", "--set", str(tmp_path)]) == 2
    assert "huge" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, renderer):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        produce.render_set(TINY, renderer, tmp_path / "file")


# The catalog


def test_every_class_of_furniture_has_models_for_test_and_for_training(models):
    for label in range(3, len(catalog.CLASSES)):
        mine = [model.held_out for model in models if model.label == label]
        assert any(mine) and not all(mine), catalog.CLASSES[label]


def test_a_model_is_named_once_and_no_people_are_used(models):
    names = [model.name for model in models]
    assert len(names) == len(set(names))
    assert {model.library for model in models} <= set(catalog.LIBRARIES)
    assert "Reallusion" not in catalog.LIBRARIES


def test_the_hold_out_depends_on_names_alone(models):
    again = catalog._hold_out(models[::-1])
    assert {m.name for m in again if m.held_out} == {m.name for m in models if m.held_out}


# The plan


@pytest.mark.parametrize("room_type", ROOM_TYPES)
def test_nothing_stands_in_anything_else_or_outside(models, room_type):
    for seed in range(6):
        plan = furnish(room_type, models, np.random.default_rng(seed))
        boxes = np.array([item.box for item in plan.placed])
        assert len(boxes) > 2
        assert boxes[:, :3].min() > -1e-6 and (boxes[:, 3:] <= np.array(plan.size) + 1e-6).all()
        shared = np.minimum(boxes[:, None, 3:], boxes[None, :, 3:]) - np.maximum(boxes[:, None, :3], boxes[None, :, :3])
        for i, j in zip(*np.nonzero((shared > 0.031).all(2)), strict=True):
            on_top = [plan.placed[k].y >= plan.placed[m].model.top for k, m in ((i, j), (j, i))]
            assert i == j or any(on_top), (plan.placed[i], plan.placed[j])


def test_the_same_seed_lays_out_the_same_room(models):
    plans = [furnish("kitchen", models, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert plans[0].placed == plans[1].placed != plans[2].placed


def test_backs_stand_to_the_wall(models):
    plan = furnish("bathroom", models, np.random.default_rng(0))
    plan.placed.clear()
    plan.kept_free.clear()
    chair = next(model for model in models if model.role == "chair")
    for wall, back in enumerate((lambda b: b[2], lambda b: b[0], lambda b: plan.size[2] - b[5],
                                 lambda b: plan.size[0] - b[3])):  # fmt: skip
        item = plan.at_wall(chair, wall, 1.0)
        assert item is not None and item.turn == wall
        assert back(item.box) == pytest.approx(0.01)


def test_an_unknown_room_type_is_named(models):
    with pytest.raises(ValueError, match="cellar"):
        furnish("cellar", models, np.random.default_rng(0))


# The picture and its labels


def test_labels_of_a_bare_floor_are_those_of_geometry(renderer):
    from experiments.rooms.scene import FLOOR, quad
    from experiments.rooms.view import Camera, Eye

    floor = quad([(-50, 0, -50), (50, 0, -50), (50, 0, 50), (-50, 0, 50)], FLOOR, np.full(3, 0.5))
    camera = Camera(np.array([0.0, 2.0, 0.0]), np.array([0.0, 0.0, -2.0]), 60.0)  # looks 45 degrees down
    labels = Eye([floor]).see(camera, 24, 32)
    half = np.sqrt(0.5)
    assert (labels.seg == FLOOR).all()
    assert np.allclose(labels.normal, [0, half, half], atol=1e-6)
    y = (1 - (np.arange(24) + 0.5) / 12) * np.tan(np.radians(30)) * 24 / 32
    expected = 2 / (half - y * half)  # height over the fall of a ray of unit depth
    assert np.allclose(labels.depth, expected[:, None], atol=1e-4)


def test_rays_that_hit_nothing_are_unknown(renderer):
    from experiments.rooms.scene import FLOOR, quad
    from experiments.rooms.view import Camera, Eye

    floor = quad([(-1, 0, -1), (1, 0, -1), (1, 0, 1), (-1, 0, 1)], FLOOR, np.full(3, 0.5))
    labels = Eye([floor]).see(Camera(np.array([0.0, 1.0, 0.0]), np.array([0.0, 2.0, 1.0]), 60.0), 6, 8)
    assert (labels.seg == 255).all() and (labels.depth == 0).all() and (labels.normal == 0).all()


def test_picture_and_labels_show_the_same_thing_in_the_same_place(renderer):
    from experiments.rooms import render
    from experiments.rooms.scene import CEILING, LAMP, quad
    from experiments.rooms.view import Camera, Eye

    shine = quad([(0, 0, -3), (2, 0, -3), (2, 1, -3), (0, 1, -3)], LAMP, np.full(3, 0.5), emission=np.ones(3))
    dark = quad([(-9, -9, -4), (9, -9, -4), (9, 9, -4), (-9, 9, -4)], CEILING, np.full(3, 0.02))
    eye, camera = Eye([shine, dark]), Camera(np.zeros(3), np.array([0.1, 0.2, -1.0]), 70.0)
    labels = eye.see(camera, 24, 32)
    scene = render.mi.load_dict(render._scene(eye.parts, camera, 24, 32, 4))
    bright = render._trace(scene, 0).mean(2) > 0.5
    assert (bright != (labels.seg == LAMP)).mean() < 0.03 and 0.05 < bright.mean() < 0.5


def test_sky_and_lamps_shine_into_the_room(renderer, models):
    from experiments.rooms.scene import build

    plan = furnish("living_room", models, np.random.default_rng(5))
    middle = np.array(plan.size) / 2
    flat = [p for p in build(plan, renderer, np.random.default_rng(0)) if p.emission is not None and len(p.faces) == 2]
    assert flat
    for part in flat:
        a, b, c = part.vertices[part.faces[0]]
        assert np.cross(b - a, c - a) @ (middle - a) > 0


def test_walls_are_whole_but_for_their_holes():
    pytest.importorskip("trimesh")
    from experiments.rooms.scene import _rectangles

    holes = [(0.5, 1.5, 0.0, 2.0), (2.0, 2.8, 0.9, 2.1)]
    area = sum((r - left) * (top - low) for left, r, low, top in _rectangles(4.0, 2.5, holes))
    assert area == pytest.approx(4 * 2.5 - 2.0 - 0.8 * 1.2)


def test_the_same_seed_gives_the_same_room_bit_for_bit(renderer):
    first, again = (produce.make_room(TINY, renderer, "test", 0) for _ in range(2))
    assert pack.room_files(first) == pack.room_files(again) and first.entry == again.entry
    length = np.linalg.norm(first.labels.normal, axis=2)
    assert np.allclose(length[first.labels.seg != 255], 1, atol=1e-5)
    assert (first.labels.normal[..., 2] > -0.75).all()  # surfaces face the camera, up to the angle of view


def test_a_stopped_run_goes_on_and_gives_the_same_set(renderer, tmp_path, models):
    whole = produce.render_set(TINY, renderer, tmp_path / "whole", processes=1)
    parts = produce._open(tmp_path / "stopped", TINY)
    marker = produce.make_room(TINY, renderer, "train", 1)
    marker.entry["room_type"] = "kept"  # to see that the finished room is not made again
    pack.write_part(parts, marker)
    (parts / ".train-00000.zip.123").write_text("half a file")
    resumed = produce.render_set(TINY, renderer, tmp_path / "stopped", processes=1)
    assert resumed["splits"] == whole["splits"] == {"train": 2, "val": 1, "test": 1}
    assert resumed["files"]["test-000.zip"] == whole["files"]["test-000.zip"]
    types = [room.entry["room_type"] for room in pack.read_rooms(tmp_path / "stopped", "train")]
    assert types == ["living_room", "kept"]
    assert not parts.exists()
    held_out = {model.name for model in models if model.held_out}
    for room in pack.read_rooms(tmp_path / "whole"):
        assert all((name in held_out) == room.entry["id"].startswith("test") for name in room.entry["models"])
    with pytest.raises(ValueError, match="other settings"):
        produce.render_set(produce.Settings(2, 1, 1, 24, 32, seed=4), renderer, tmp_path / "whole")


# The set that ships with the package

needs_set = pytest.mark.skipif(not (EMBEDDED / "meta.json").is_file(), reason="no embedded set")


@needs_set
def test_the_embedded_set_is_large_enough_and_small_enough():
    meta = json.loads((EMBEDDED / "meta.json").read_text())
    sizes = [path.stat().st_size for path in EMBEDDED.iterdir()]
    assert meta["size"] == [96, 128] and meta["classes"] == list(catalog.CLASSES)
    assert all(meta["splits"][split] >= least for split, least in (("train", 800), ("val", 100), ("test", 200)))
    assert sum(sizes) <= 25e6 and max(sizes) < 4e6


@needs_set
def test_every_class_is_in_a_twelfth_of_the_embedded_pictures_and_test_has_its_own_furniture():
    present, pixels, rooms = np.zeros(15), np.zeros(256), 0
    used = {"train": set(), "val": set(), "test": set()}
    for path in sorted(EMBEDDED.glob("*.zip")):
        with zipfile.ZipFile(path) as shard:
            for entry in json.loads(shard.read("index.json"))["rooms"]:
                seg = np.array(Image.open(io.BytesIO(shard.read(entry["id"] + ".seg.png"))))
                counts = np.bincount(seg.ravel(), minlength=256)
                present, pixels, rooms = present + (counts[:15] >= 20), pixels + counts, rooms + 1
                used[path.name.split("-")[0]].update(entry["models"])
    assert (present / rooms >= 0.08).all()
    assert pixels[:3].sum() / pixels.sum() <= 0.65
    assert not used["test"] & (used["train"] | used["val"])


@needs_set
def test_the_attribution_names_every_creator(models):
    text = (EMBEDDED.parents[2] / "docs/ATTRIBUTION-ROOMS.md").read_text()
    used = {name for path in EMBEDDED.glob("*.zip") for name in _models_in(path)}
    for model in models:
        assert model.name not in used or f"**{model.creator}**" in text


def _models_in(path):
    with zipfile.ZipFile(path) as shard:
        return {name for entry in json.loads(shard.read("index.json"))["rooms"] for name in entry["models"]}
