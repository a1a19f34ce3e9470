import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cut import checkpoint, export
from cut.cli import main
from cut.network import MultiTaskNet, NetworkConfig
from cut.predict import Prediction, checked, describe, draw, open_model, predict, read_picture
from cut.tasks import classification, depth, normals, regression_map, segmentation

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

HEIGHT, WIDTH = 24, 32
CLASSES = ("dark", "bright")
TASKS = [segmentation(CLASSES), normals(), depth(), regression_map("edge"), classification(("day", "night"))]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
META = export.metadata(TASKS, MEAN, STD, (HEIGHT, WIDTH))


class Grey(nn.Module):
    """Outputs that follow from the picture by hand: bright is class 1, depth is four times brightness."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, image):
        bright = (image * self.std + self.mean).mean(1, keepdim=True)
        toward = torch.cat([bright * 0, bright * 0, bright * 0 + 2], 1)
        scene = torch.stack([bright.mean((1, 2, 3)) * 0, bright.mean((1, 2, 3)) * 0 + 1], 1)
        seg = torch.cat([1 - bright, bright], 1)
        return {"seg": seg, "normal": toward, "depth": bright * 4, "edge": bright * 0 + 0.25, "scene": scene}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "grey.onnx"
    names = [t.name for t in TASKS]
    export.export_onnx(Grey(), path, torch.zeros(1, 3, HEIGHT, WIDTH), tasks=names, meta=META)
    return path


@pytest.fixture()
def half(tmp_path):
    """A picture whose left half is black and whose right half is white."""
    array = np.zeros((48, 64, 3), np.uint8)
    array[:, 32:] = 255
    Image.fromarray(array).save(tmp_path / "half.png")
    return tmp_path / "half.png"


def test_picture_is_resized_normalised_and_seen_by_every_task(model, half):
    found = predict(model, half)
    assert found.picture.shape == (HEIGHT, WIDTH, 3)
    assert found.outputs["seg"].shape == (2, HEIGHT, WIDTH)
    assert (found.outputs["seg"].argmax(0)[:, :15] == 0).all() and (found.outputs["seg"].argmax(0)[:, 17:] == 1).all()
    assert np.allclose(found.outputs["depth"][0], found.picture.mean(-1) / 255 * 4, atol=1e-4)
    assert found.milliseconds > 0


def test_description_fits_each_kind_of_task(model, half):
    facts = describe(predict(model, half))
    assert set(facts) == {t.name for t in TASKS}
    assert set(facts["seg"]) == set(CLASSES) and sum(facts["seg"].values()) == pytest.approx(1, abs=1e-3)
    assert facts["depth"]["unit"] == "m" and facts["depth"]["max"] == pytest.approx(4, abs=0.01)
    assert facts["normal"]["facing_camera"] == 1
    assert facts["edge"]["mean"] == pytest.approx(0.25, abs=1e-3)
    assert max(facts["scene"], key=facts["scene"].get) == "night"
    assert facts["scene"]["night"] == pytest.approx(np.e / (1 + np.e), abs=1e-3)


def test_drawing_has_a_panel_for_the_picture_and_each_dense_task(model, half):
    found = predict(model, half)
    whole = draw(found)
    one = draw(Prediction(found.picture, {"depth": found.outputs["depth"]}, META, 1.0))
    assert whole.width > 2 * one.width and whole.height > one.height > HEIGHT


def test_classes_without_names_are_numbered(model, half):
    found = predict(model, half)
    meta = json.loads(json.dumps(META))
    meta["tasks"]["seg"]["classes"] = meta["tasks"]["scene"]["classes"] = []
    nameless = Prediction(found.picture, found.outputs, meta, 1.0)
    assert set(describe(nameless)["seg"]) == {"0", "1"}
    assert draw(nameless).size == draw(found).size


def test_negative_depth_is_drawn_and_not_taken_for_unknown():
    output = np.linspace(-1, 2, HEIGHT * WIDTH).reshape(1, HEIGHT, WIDTH).astype(np.float32)
    drawn = np.asarray(draw(Prediction(np.full((HEIGHT, WIDTH, 3), 9, np.uint8), {"depth": output}, META, 1.0)))
    right = drawn[30 : 30 + 9 * HEIGHT - 20, drawn.shape[1] // 2 + 10 : -20]
    assert right.any(-1).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "I;16", "CMYK"])
def test_pictures_of_any_mode_are_read_as_the_same_grey(mode, tmp_path):
    grey = Image.new("L", (9, 7), 255 if mode == "1" else 128)
    if mode == "I;16":
        grey = Image.fromarray(np.full((7, 9), 128 * 257, np.uint16))
    else:
        grey = (
            grey.quantize(4)
            if mode == "P"
            else grey.convert("RGB").convert(mode)
            if mode == "CMYK"
            else grey.convert(mode)
        )
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    grey.save(path)
    found = read_picture(path)
    assert found.mode == "RGB" and found.size == (9, 7)
    assert abs(int(np.asarray(found)[0, 0, 0]) - (255 if mode == "1" else 128)) <= 1


def test_transparent_parts_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (np.asarray(read_picture(tmp_path / "a.png")) == 255).all()


def test_picture_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (10, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (4, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("compact")
    network = MultiTaskNet(
        {"seg": 2, "depth": 1}, (), NetworkConfig(backbone="mobilenetv3_small_050", head_width=8)
    ).eval()
    meta = export.metadata([segmentation(CLASSES), depth()], network.mean, network.std, (32, 32))
    checkpoint.save(network, path / "good", metadata=meta)
    checkpoint.save(network, path / "bare")
    return path


def test_folder_of_a_compact_model_runs_too(folder, half):
    found = predict(folder / "good", half)
    assert found.outputs["seg"].shape == (2, 32, 32)
    loaded = checkpoint.load(folder / "good")
    facts = found.meta["input"]
    scaled = torch.from_numpy(found.picture.copy()).permute(2, 0, 1)[None] / 255 - torch.tensor(facts["mean"]).view(
        3, 1, 1
    )
    with torch.no_grad():
        expected = loaded((scaled / torch.tensor(facts["std"]).view(3, 1, 1)).float())["depth"][0].numpy()
    assert np.allclose(found.outputs["depth"], expected, atol=1e-4)


def test_folder_without_facts_is_refused(folder):
    with pytest.raises(ValueError, match="bare carries no usable facts"):
        open_model(folder / "bare")


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_other_channels_are_refused_with_the_reason(channels):
    meta = {"input": {"height": 8, "width": 8, "mean": [0.0] * channels, "std": [1.0] * channels}, "tasks": {}}
    with pytest.raises(ValueError, match=rf"small takes pictures of {channels} channels; .* those of 3"):
        checked(meta, "small")


@pytest.mark.parametrize("wrong", ["missing", "text", "folder"])
def test_what_is_no_model_is_refused(wrong, tmp_path):
    path = tmp_path / wrong
    if wrong == "text":
        path.write_text("no model")
    if wrong == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=wrong):
        open_model(path)


def test_command_draws_beside_you_and_prints_a_line_per_task(model, half, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(model), str(half)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:5]] == [t.name for t in TASKS]
    assert "ms" in out[5]
    with Image.open(tmp_path / "half-prediction.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 4 * 288
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half-prediction.png", "half.png"]


def test_command_prints_json(model, half, tmp_path, capsys):
    target = tmp_path / "new" / "drawn.png"
    assert main(["predict", str(model), str(half), "--out", str(target), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["tasks"]) == {t.name for t in TASKS}
    assert told["picture"] == str(target) and target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx", "half.png"], "none.onnx"),
        (["MODEL", "none.png"], "none.png"),
        (["MODEL", "half.png", "--out", "a.txt"], ".png"),
        (["MODEL", "half.png", "--out", "half.png"], "overwrite"),
        (["MODEL", "broken.png"], "broken.png"),
        (["MODEL", "cut.png"], "cut.png"),
        (["half.png", "half.png"], "half.png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, model, half, monkeypatch, capsys):
    monkeypatch.chdir(half.parent)
    (half.parent / "broken.png").write_text("no picture")
    (half.parent / "cut.png").write_bytes(half.read_bytes()[:60])
    before = half.read_bytes()
    assert main(["predict", *[str(model) if a == "MODEL" else a for a in arguments]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert half.read_bytes() == before
    assert not (half.parent / "half-prediction.png").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["--version"]])
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "cut" in capsys.readouterr().out
