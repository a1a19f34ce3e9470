"""Opening: from what a user names (a folder, a checkpoint, a function, a backbone) to a model with its data."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cut import checkpoint
from cut.commands.source import CUT, Data, Source
from cut.decomposition import check_tasks, forward, network_input
from cut.facts import facts_of
from cut.modelfile import SPEC
from cut.objectives import Objective, checked_loss, objectives_of

if TYPE_CHECKING:
    from cut.data.base import MultiTaskData

ROOMS = "cut.data.rooms.Rooms"
FORMS = "a folder with a model, a Lightning checkpoint of ours, or module:function"
RETURNS = "(model, loader, tasks, example), then, if you like, a test loader (or None) and facts"


def open_source(
    name: str, weights: str | Path | None = None, data: str | None = None, seed: int = 0, labels: bool = False
) -> Source:
    """The model that a command names.

    Args:
        name: A folder that holds a model (of ``cut prune``, ``cut.save``, or a run of ours), a Lightning checkpoint of
            :class:`cut.model.MultiTaskModel`, or ``module:function``.
        weights: A folder whose model file is loaded into the function's model.
        data: For a folder: a YAML as in ``configs/data`` or the class path of a data module; None = Rooms, if the
            command needs labels.
        seed: Seed of the data's order.
        labels: Whether the command needs labelled data.

    Raises:
        ValueError: If there is no such model, it is damaged, or the data do not fit it.
    """
    if ":" in name and not Path(name).exists():
        if data is not None:
            raise ValueError(f"--data {data}: {name} brings its own data; allowed only for a folder")
        return _from_function(name, weights)
    if weights is not None:
        raise ValueError(f"--weights {weights}: allowed only for module:function; {name} has its own weights")
    network, path, meta = _from_folder(name)
    tasks = list(network.active) if hasattr(network, "active") else []
    if not tasks:
        raise ValueError(f"{name} is of a foreign network: name its module:function, and the folder with --weights")
    source = Source(name, network, tasks, torch.empty(0), meta, path)
    if data is not None or labels:
        found = data_module(data or ROOMS, list(network.heads), seed)  # type: ignore[arg-type]
        source.data = _of_module(found, tasks)
        source.meta = {**facts(found, tasks), **{k: v for k, v in meta.items() if k == CUT}}
        source.example = source.data.score(1)[0]["image"][:4]
    else:
        source.unlabelled = _pictures(meta, network)
        source.example = source.unlabelled(1)[0]
        source.meta = {**_seen(network, source.example, mean=network.mean, std=network.std), **meta}
    return source


def fresh(backbone: str, data: str | None, tasks: list[str] | None, seed: int) -> Source:
    """A new network of ours on a timm backbone, with a head for each task of a data set.

    The backbone has pre-trained weights if the cache holds them (``python -m cut.weights``), else random ones.

    Args:
        backbone: Any timm name.
        data: As for :func:`open_source`.
        tasks: The tasks; None = all of the data.
        seed: Of first weights and data.

    Raises:
        ValueError: If there is no such backbone, data set or task, or the data's pictures are of a wrong size for it.
    """
    import timm

    from cut import backbones
    from cut.network import MultiTaskNet, NetworkConfig

    if not timm.is_model(backbone):
        raise ValueError(f"no model {backbone!r}; allowed: {FORMS}, or a timm name such as mobilenetv2_100")
    module = data_module(data or ROOMS, tasks, seed)
    names = [t.name for t in module.tasks]
    image = module.score_batches(1, 4)[0]["image"]
    height, width = (int(s) for s in image.shape[-2:])
    patched = backbones.probe(backbone)[2] is not None
    config = NetworkConfig(backbone, "auto", img_size=(height, width) if patched else None, resize="patch")
    network = MultiTaskNet(
        {t.name: t.channels for t in module.tasks}, [t.name for t in module.tasks if not t.dense], config
    )
    network.eval()
    try:
        _seen(network, image)
    except RuntimeError as error:  # of layers that are built for one size
        raise ValueError(
            f"{backbone} takes no pictures of {height}x{width}: {error}; allowed: a backbone for any size, or "
            "data of its own size"
        ) from error
    return Source(backbone, network, names, image, facts(module, names), None, _of_module(module, names))


def with_new_head(name: str, task: str, data: str | None, seed: int, labels: bool = False) -> Source:
    """A folder's network with a fresh head for a task that it does not have; its other heads stay.

    Args:
        name: As for :func:`open_source`, a folder or a checkpoint.
        task: The new task, one of the data set's.
        data: As for :func:`open_source`.
        seed: Of the data; the head starts from torch's own random state.
        labels: Whether the other tasks' labels are needed too.

    Raises:
        ValueError: If the network has the task already or is cut, or the data have no such labels.
    """
    from cut.network import MultiTaskNet

    network, path, meta = _from_folder(name)
    known = list(network.heads)
    if CUT in meta:
        raise ValueError(f"{name} is cut already; a new task starts from the dense pre-trained model")
    if task in known:
        raise ValueError(f"--task {task}: the model has this task already; cut prune cuts it for known tasks")
    module = data_module(data or ROOMS, [task, *(known if labels else [])], seed)
    mine = {t.name: t for t in module.tasks}
    spec = network.spec()
    spec["outputs"] = {**spec["outputs"], task: mine[task].channels}
    spec["image_level"] = [*spec["image_level"], *([] if mine[task].dense else [task])]
    grown = MultiTaskNet.from_spec(spec)
    try:
        grown.load_state_dict(network.state_dict(), strict=False)
    except RuntimeError as error:
        raise ValueError(f"{name} is no dense model: {' '.join(str(error).split())[:200]}") from error
    found = _of_module(module, list(mine))
    for other in known:  # what belongs to which task is seen with any loss
        found.objectives.setdefault(other, Objective(lambda output, _: output.float().mean()))
    source = Source(name, grown.eval(), [task], torch.empty(0), facts(module, [task]), path, found)
    source.example = found.score(1)[0]["image"][:4]
    return source


def model_folder(path: Path) -> Path:
    """Where a folder's model file is: in it, or, in a run's folder, in ``compact``.

    Raises:
        ValueError: If there is none.
    """
    for folder in (path, path / "compact"):
        if (folder / SPEC).exists():
            return folder
    raise ValueError(f"{path} holds no model: neither {SPEC} nor compact/{SPEC}; allowed: {FORMS}")


def _from_folder(name: str) -> tuple[Any, Path, dict[str, Any]]:
    """A model of ours, its path and its facts."""
    path = Path(name)
    if path.is_dir():
        folder = model_folder(path)
        if checkpoint.is_foreign(folder):
            raise ValueError(f"{name} is of a foreign network: name its module:function, and the folder with --weights")
        return checkpoint.load(folder), folder, checkpoint.read_metadata(folder)
    if path.suffix == ".ckpt" and path.is_file():
        return _from_lightning(path), path, {}
    raise ValueError(f"no model {name!r}; allowed: {FORMS}")


def _from_lightning(path: Path) -> nn.Module:
    """The network in a checkpoint that a Lightning trainer wrote of our module."""
    from cut.network import MultiTaskNet, picture_size
    from cut.widths import MULTIPLE, narrowed

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        start = "network."
        state = {k.removeprefix(start): v for k, v in stored["state_dict"].items() if k.startswith(start)}
        config = stored["hyper_parameters"]["network"]
        heads = list(dict.fromkeys(k.split(".")[1] for k in state if k.startswith("heads.")))
        last = {t: [v for k, v in state.items() if k.startswith(f"heads.{t}.") and v.ndim in (2, 4)][-1] for t in heads}
        outputs = {t: len(w) for t, w in last.items()}
        level = [t for t, w in last.items() if w.ndim == 2]
        network = MultiTaskNet.from_spec({"outputs": outputs, "image_level": level, "config": config})
        if (width := stored["hyper_parameters"].get("width", 1.0)) < 1:
            network = narrowed(network, width, picture_size(network), multiple=MULTIPLE)
        network.load_state_dict(state)
    except Exception as error:  # unpickling and loading fail in many ways
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable Lightning checkpoint of cut.model.MultiTaskModel: {reason}") from error
    return network.eval()


def _pictures(meta: dict[str, Any], network: Any) -> Callable[[int], list[Tensor]]:
    """Batches of the pictures that ship with the package, at the model's input size."""
    from cut.data.rooms import Rooms

    told = meta.get("input", {})
    size = [int(told[k]) for k in ("height", "width")] if told else list(network.config.img_size or (96, 128))
    rooms = Rooms(tasks=("scene",), mean=told.get("mean", network.mean), std=told.get("std", network.std))

    def pictures(count: int) -> list[Tensor]:
        images = [batch["image"] for batch in rooms.score_batches(count, 4)]
        return [nn.functional.interpolate(i, size=size, mode="bilinear", align_corners=False) for i in images]

    return pictures


# -------------------------------------------------------------------------------------------------- a function


def _from_function(name: str, weights: str | Path | None) -> Source:
    """What ``module:function`` returns, checked by one forward pass."""
    made = returned(name)
    model, objectives = made.model, made.objectives
    stored: dict[str, Any] = {}
    path = None
    if weights is not None:
        model, path = checkpoint.load(weights, lambda: made.model), Path(weights)
        stored = checkpoint.read_metadata(weights)
    try:
        meta = _seen(model.eval(), made.example, made.facts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # layers that do not fit each other fail in many ways
        if weights is None:
            raise
        raise ValueError(f"{name}: its example does not go through the model in {weights}: {error}") from error
    missing = sorted({*meta["tasks"], *(made.facts or {}).get("tasks", {})} - set(objectives))
    if missing:
        raise ValueError(f"{name}: no loss for task {missing[0]!r}; there are losses for {sorted(objectives)}")
    data = Data(made.loader, made.test, objectives, lambda n: _first(made.loader, n))
    return Source(name, model, check_tasks(list(meta["tasks"]), objectives), made.example, stored | meta, path, data)


def _seen(network: nn.Module, example: Tensor, told: Any = None, **norm: Any) -> dict[str, Any]:
    """Facts on a model's input and tasks, by one forward pass; see :func:`cut.facts.facts_of`."""
    with torch.no_grad():
        outputs = forward(network, example[:2], lambda x: x)
    return facts_of(example, outputs, told, **norm)


@dataclass(frozen=True)
class Returned:
    """What a function of one's own returned.

    Attributes:
        model: The dense network.
        loader: To train on.
        objectives: Losses and metrics of its tasks.
        example: An input of it.
        test: A loader to judge on; the one to train on if there is no other.
        facts: On its input and tasks, as much as one likes to state; see :func:`cut.facts.facts_of`.
    """

    model: nn.Module
    loader: Iterable[Any]
    objectives: dict[str, Objective]
    example: Tensor
    test: Iterable[Any]
    facts: Any


def returned(name: str) -> Returned:
    """Call ``module:function`` and check what it returns.

    Raises:
        ValueError: If there is no such function, or it returns anything else.
    """
    made = function_of(name)()
    if not isinstance(made, (tuple, list)) or len(made) not in (4, 5, 6) or not isinstance(made[0], nn.Module):
        kind = [type(v).__name__ for v in made] if isinstance(made, (tuple, list)) else type(made).__name__
        raise ValueError(f"{name} returned {kind}; it must return {RETURNS}")
    model, loader, tasks, example, test, told = (*made, None, None)[:6]
    if not isinstance(example, Tensor):
        raise ValueError(f"{name}: the example input is {type(example).__name__}; a tensor is needed")
    for what, one in (("loader", loader), ("test loader", loader if test is None else test)):
        if not hasattr(one, "__iter__") or isinstance(one, Iterator):
            again = " that can be gone through again" if isinstance(one, Iterator) else ""
            raise ValueError(f"{name}: the {what} is {type(one).__name__}; a loader of batches{again} is needed")
    objectives = {t: replace(o, loss=checked_loss(t, o.loss)) for t, o in objectives_of(tasks).items()}
    return Returned(model, loader, objectives, example, loader if test is None else test, told)


def built(name: str) -> nn.Module:
    """The model of ``module:function``, which returns it alone or as the first of what the commands ask for.

    Raises:
        ValueError: If there is no such function, or it returns no model.
    """
    made = function_of(name)()
    model = made[0] if isinstance(made, (tuple, list)) and made else made
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned {type(made).__name__}; it must return a model, or {RETURNS}")
    return model


def function_of(name: str) -> Callable[[], Any]:
    """The function that ``module:function`` names, imported also from the folder that the command runs in.

    Raises:
        ValueError: If there is none.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ValueError(f"no module {error.name!r} (in {name!r}; looked here and among the installed ones)") from error
    except (AttributeError, ValueError) as error:
        raise ValueError(f"no function {function!r} in the module {module!r}") from error
    except SyntaxError as error:
        raise ValueError(f"the module {module!r} cannot be read: {error}") from error
    if not callable(found):
        raise ValueError(f"{name} is {type(found).__name__}; a function is needed that returns {RETURNS}")
    needed: list[str] = []
    with contextlib.suppress(ValueError):  # some callables have no signature; that says nothing
        needed = [p.name for p in inspect.signature(found).parameters.values() if _is_needed(p)]
    if needed:
        raise ValueError(f"{name} needs {', '.join(needed)}; allowed: a function that is called without arguments")
    return found


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _first(loader: Iterable[Any], count: int) -> list[Any]:
    """The loader's first batches; fewer if it has fewer."""
    found = [batch for batch, _ in zip(loader, range(count), strict=False)]
    if not found:
        raise ValueError("the loader gives no batches")
    network_input(found[0])  # says what is wrong with the batch, before any work
    return found


# ------------------------------------------------------------------------------------------- a data set of ours


def data_module(name: str, tasks: list[str] | None, seed: int = 0) -> MultiTaskData:
    """A data module by its class path, or as a YAML in the form of ``configs/data`` has it.

    Args:
        name: ``cut.data.rooms.Rooms``, or a file with ``class_path`` and ``init_args``, under ``data`` or not.
        tasks: The tasks that it gives labels for, unless the file names its own; None = the module's default.
        seed: Its seed, unless the file names one.

    Raises:
        ValueError: If there is no such class or file, or the options are not allowed.
    """
    import jsonargparse
    import yaml

    from cut.data.base import MultiTaskData

    entry: dict[str, Any] = {"class_path": name}
    if name.endswith((".yaml", ".yml")):
        try:
            read = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--data {name} is no readable YAML file: {error}") from error
        entry = read.get("data", read) if isinstance(read, dict) else {}
    options = {"seed": seed, **({} if tasks is None else {"tasks": tasks}), **(entry.get("init_args") or {})}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MultiTaskData, "data", required=True)
    try:
        config = parser.parse_object({"data": {"class_path": entry.get("class_path"), "init_args": options}})
        return parser.instantiate_classes(config).data
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"--data {name}: {' '.join(str(error).split())}") from error


def _of_module(module: MultiTaskData, tasks: list[str]) -> Data:
    """A data module's loaders, losses and metrics."""
    mine = {t.name: t for t in module.tasks}
    missing = [t for t in tasks if t not in mine]
    if missing:
        raise ValueError(f"{module.name} has no labels for the model's task {missing[0]!r}; it has {sorted(mine)}")
    module.setup("fit")
    objectives = {
        n: Objective(t.loss, dict(t.metrics().items(keep_base=True)), t.weight, t.dense) for n, t in mine.items()
    }
    return Data(module.train_dataloader(), module.test_dataloader(), objectives, module.score_batches)


def facts(module: MultiTaskData, tasks: list[str]) -> dict[str, Any]:
    """The facts that an exported file carries, see :func:`cut.export.metadata`."""
    from cut.export import metadata

    mine = {t.name: t for t in module.tasks}
    height, width = module.score_batches(1, 1)[0]["image"].shape[-2:]
    return metadata([mine[t] for t in tasks], module.mean, module.std, (height, width))
