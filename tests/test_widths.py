"""Widths: shapes, weights and costs of narrower networks, their files, and what is refused."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from cut import checkpoint
from cut.commands.opening import open_source
from cut.compact import compact
from cut.cost import macs
from cut.data.synthetic import Synthetic
from cut.export import check_parity, export_onnx
from cut.model import MultiTaskModel
from cut.network import MultiTaskNet, NetworkConfig, picture_size
from cut.norms import PartialNorm
from cut.records import read
from cut.towers import SmallTowers
from cut.units import find_groups
from cut.widths import narrowed
from experiments.run import run
from tests.experiments.test_run import TINY, arguments
from tests.small_networks import trained

SLOW = ["mobilenetv2_100", "resnet18", "vit_small_patch14_dinov2"]
BACKBONES = ["test_efficientnet", "test_resnet", "test_vit", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
TASKS = ("seg", "normal", "scene")


def fresh(backbone, seed=0, **options):
    torch.manual_seed(seed)
    return MultiTaskNet({"seg": 4, "scene": 5}, ["scene"], NetworkConfig(backbone, head_width=16, **options))


def model_of(backbone, width, seed=0, **options):
    torch.manual_seed(seed)
    data = Synthetic(TASKS, size=(32, 32), num=8, batch_size=4)
    config = NetworkConfig(backbone, head_width=16, **({"resize": "patch"} if "vit" in backbone else {}), **options)
    return MultiTaskModel(data.tasks, config, width=width), data


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, **quiet, **options)


def same(got, want):
    return set(got) == set(want) and all(torch.equal(got[t], want[t]) for t in want)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_group_keeps_its_first_units_and_files_give_equal_outputs(backbone, tmp_path):
    dense = fresh(backbone)
    size = picture_size(dense)
    slim = trained(narrowed(dense, 0.5, size))
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    before = {g.name: g.units for g in find_groups(dense.eval(), image)}
    assert {g.name: g.units for g in find_groups(slim, image)} == {n: max(1, round(u / 2)) for n, u in before.items()}
    assert not any(isinstance(m, PartialNorm) for m in slim.modules()), "nothing was cut: norms count what is there"
    with torch.no_grad():
        want = slim(image)
        checkpoint.save(slim, tmp_path / "file")
        assert same(checkpoint.load(tmp_path / "file")(image), want)
    export_onnx(slim, tmp_path / "slim.onnx", image, tasks=["seg", "scene"])
    assert set(check_parity(tmp_path / "slim.onnx", slim, [image])) == {"seg", "scene"}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("width", [0.5, 0.75])
def test_multiply_accumulates_fall_with_the_square(backbone, width):
    dense = fresh(backbone)
    size = picture_size(dense)
    image = torch.zeros(1, 3, *size)
    ratio = macs(narrowed(dense, width, size), image) / macs(dense, image)
    assert ratio == pytest.approx(width**2, rel=0.35 if backbone.startswith("test_") else 0.15)


def test_the_weights_that_stay_are_the_first_and_the_network_is_left_as_it_is():
    dense = fresh("test_resnet", dropout=0.1)
    before, random_state = copy.deepcopy(dense.state_dict()), torch.get_rng_state()
    dense.heads["seg"].eval()
    slim = narrowed(dense, 0.5, (64, 64))
    joined = [*range(8), *range(16, 20)]  # a head's deep and early channels lie side by side
    for name, value in slim.state_dict().items():
        if value.ndim:
            rows = joined if ".join.0." in name or ".join.1." in name else list(range(len(value)))
            columns = joined if ".join.3." in name else list(range(value.shape[1] if value.ndim > 1 else 0))
            want = before[name][rows]
            assert torch.equal(value, want[:, columns] if value.ndim > 1 else want), name
    assert all(torch.equal(v, before[n]) for n, v in dense.state_dict().items())
    assert dense.training and slim.training and not slim.heads["seg"].training
    assert torch.equal(random_state, torch.get_rng_state())
    assert slim.channels == [c.shape[1] for c in slim.backbone(torch.zeros(1, 3, 64, 64))] != dense.channels


def test_width_one_is_the_network_as_it_was():
    plain, full = model_of("test_resnet", 1.0)[0], fresh("test_resnet")
    torch.manual_seed(0)
    want = MultiTaskNet(plain.network.outputs, ["scene"], NetworkConfig("test_resnet", head_width=16)).state_dict()
    assert set(want) == set(plain.network.state_dict())
    assert all(torch.equal(v, want[n]) for n, v in plain.network.state_dict().items())
    assert all(torch.equal(v, full.state_dict()[n]) for n, v in narrowed(full, 1.0, (64, 64)).state_dict().items())


@pytest.mark.parametrize("multiple", [4, 8])
def test_channels_are_rounded_to_a_multiple(multiple):
    dense = fresh("test_resnet")
    image = torch.zeros(2, 3, 64, 64)
    full = {g.name: g.units for g in find_groups(dense.eval(), image)}
    for group in find_groups(narrowed(dense, 0.3, (64, 64), multiple=multiple), image):
        units, target = full[group.name], 0.3 * full[group.name]
        assert group.units % multiple == 0 or group.units == units
        assert abs(group.units - target) <= multiple / 2 or group.units == min(units, multiple)


@pytest.mark.parametrize("options", [{"img_size": (32, 48)}, {"img_size": (40, 60), "resize": "patch"}, {}], ids=str)
def test_a_grid_of_patches_finds_its_picture(options):
    dense = fresh("vit_tiny_patch16_224", **options)
    slim = narrowed(dense, 0.34, picture_size(dense))
    assert {m.num_heads for m in slim.modules() if hasattr(m, "num_heads")} == {1}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_lightning_checkpoint_builds_the_narrow_network_again(backbone, tmp_path):
    model, data = model_of(backbone, 0.5)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(7)
    again = MultiTaskModel.load_from_checkpoint(tmp_path / "last.ckpt", tasks=data.tasks, weights_only=True)
    image = torch.randn(2, 3, 28, 28) if "patch14" in backbone else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model.eval()(image)
        assert same(again.eval()(image), want)
        assert same(open_source(str(tmp_path / "last.ckpt")).network(image), want)
        small = compact(model.network, ["seg"], None, image)
    assert macs(small, image) < macs(model.network, image)


def test_towers_read_the_narrow_maps(tmp_path):
    model, data = model_of("test_resnet", 0.5)
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[SmallTowers()]).fit(model, data)
    assert all(torch.isfinite(loss) for loss in model.latest.values()) and set(model.latest) == set(model.tasks)


@pytest.mark.parametrize("width", [0.0, -0.5, 1.5])
def test_widths_outside_are_refused(width):
    with pytest.raises(ValueError, match=rf"width {width}; allowed: above 0, up to 1"):
        model_of("test_resnet", width)
    with pytest.raises(ValueError, match="width"):
        narrowed(fresh("test_resnet"), width, (64, 64))


def test_pretrained_weights_and_a_bad_multiple_are_refused():
    with pytest.raises(ValueError, match=r"weights 'auto' do not fit a network of width 0.5; allowed: None"):
        model_of("test_resnet", 0.5, weights="auto")
    with pytest.raises(ValueError, match="multiple 0; allowed"):
        narrowed(fresh("test_resnet"), 0.5, (64, 64), multiple=0)


def test_a_run_and_a_cut_from_it(tmp_path: Path):
    more = ["--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false", "--export=false"]
    slim = read(run([*arguments("dense", tmp_path, *more), "--model.init_args.width=0.5"]))
    assert slim.config["model"]["init_args"]["width"] == 0.5
    full = MultiTaskNet({"seg": 7, "normal": 3, "depth": 1, "edge": 1}, config=NetworkConfig(**TINY))
    assert slim.cost["dense_all_heads"]["params"] < 0.4 * sum(p.numel() for p in full.parameters())
    small = checkpoint.load(tmp_path / "dense/compact")
    state = torch.load(tmp_path / "dense/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, state[f"network.{n}"]) for n, v in small.state_dict().items())
    start = arguments("cut", tmp_path, *more, f"--init={tmp_path / 'dense'}", "--pruning.batches=1")
    cut = read(run([*start, "--model.init_args.width=0.5"]))
    assert cut.sparsity["kept"] == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(ValueError, match="of another model"):
        run(start)
