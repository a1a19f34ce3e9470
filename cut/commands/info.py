"""``cut info``: a model's tree: what its tasks share and what is private, with size and sparsity of every part."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cut.commands import options
from cut.commands.terminal import Terminal, human, in_bytes

if TYPE_CHECKING:
    from torch import nn

    from cut.commands.source import Source

EXAMPLES = """examples:
  cut info runs/demo/dense
  cut info runs/small --depth 3
  cut info mine:setup --json
"""
UNUSED = "used by no task that it puts out"


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "info",
        help="draw what a model's tasks share, with size and sparsity",
        description="Draw a model's tree by what its tasks share: parameters, bytes, sparsity of every part.",
        epilog=EXAMPLES,
    )
    options.add_source(parser)
    parser.add_argument("--depth", type=options.whole(0), default=2, help="levels of modules below a part (default: 2)")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Show the tree, or the same as JSON."""
    terminal = Terminal(args)
    from cut.commands.opening import open_source
    from cut.commands.source import inner
    from cut.cost import cost, size_on_disk

    source = open_source(args.source, args.weights, args.data, args.seed)
    parts = parts_of(source)
    whole = cost(source.network, source.example)
    facts: dict[str, Any] = {
        "model": source.name,
        "tasks": source.tasks,
        "input": list(source.example.shape[1:]),
        "params": whole.params,
        "nonzero": whole.nonzero,
        "macs": whole.macs,
        "bytes": None if source.path is None else size_on_disk(source.path),
        "parts": {part: numbers(inner(source), names) for part, names in parts.items()},
    }
    if source.cut:
        facts["cut"] = source.meta["cut"]
    terminal.result(facts, tree(source, parts, facts, args.depth))


def parts_of(source: Source) -> dict[str, list[str]]:
    """Part to the parameters in it: what all tasks share, what some share, what is private to one, what no task uses.

    Which task uses what is seen by gradients, so it holds for any model and any names.
    """
    from cut.commands.source import inner
    from cut.decomposition import owners

    network = inner(source)
    probes = {t: lambda out, _: out.float().square().mean() for t in source.tasks}
    used = owners(network, source.example[:2], probes, source.tasks, lambda x: x)
    found: dict[frozenset[str], list[str]] = {}
    for name, _ in network.named_parameters():
        found.setdefault(frozenset(t for t, mine in used.items() if name in mine), []).append(name)
    order = sorted(found, key=lambda who: (not who, -len(who), [source.tasks.index(t) for t in sorted(who)]))
    return {_title(who, source.tasks): found[who] for who in order}


def _title(who: frozenset[str], tasks: list[str]) -> str:
    """What a part is called."""
    if not who:
        return UNUSED
    if len(who) == 1:
        return f"private to {next(iter(who))}"
    return "shared by all" if len(who) == len(tasks) else f"shared by {', '.join(t for t in tasks if t in who)}"


def numbers(network: nn.Module, names: list[str]) -> dict[str, float]:
    """Parameters, bytes in memory, and sparsity over the Conv and Linear weights, of some parameters."""
    from cut.decomposition import prunable

    own, weights = dict(network.named_parameters()), prunable(network)
    mine = [own[n] for n in names]
    cut = [weights[n] for n in names if n in weights]
    total = sum(w.numel() for w in cut)
    zeros = sum(int((w == 0).sum()) for w in cut)
    return {
        "params": sum(p.numel() for p in mine),
        "bytes": sum(p.numel() * p.element_size() for p in mine),
        "sparsity": round(zeros / total, 4) if total else 0.0,
    }


def tree(source: Source, parts: dict[str, list[str]], facts: dict[str, Any], depth: int) -> Any:
    """The tree as rich draws it."""
    from rich.tree import Tree

    from cut.commands.source import inner

    size = "" if facts["bytes"] is None else f", {in_bytes(facts['bytes'])} on disk"
    shape = "x".join(map(str, facts["input"]))
    top = Tree(f"{source.name}: {', '.join(source.tasks)}; input {shape}")
    top.add(
        f"{human(facts['params'])} parameters, {human(facts['nonzero'])} not zero, {human(facts['macs'])} MACs{size}"
    )
    for part, names in parts.items():
        branch = top.add(_line(part, facts["parts"][part]))
        _modules(branch, inner(source), names, "", depth)
    return top


def _line(name: str, found: dict[str, float]) -> str:
    sparse = f", {found['sparsity']:.1%} zero" if found["sparsity"] else ""
    return f"{name}: {human(found['params'])} parameters, {in_bytes(found['bytes'])}{sparse}"


def _modules(branch: Any, network: nn.Module, names: list[str], prefix: str, depth: int) -> None:
    """The modules that hold a part's parameters, one level at a time; a chain of single children is one line."""
    if depth == 0:
        return
    children: dict[str, list[str]] = {}
    for name in names:
        child = name.removeprefix(prefix).split(".")[0]
        children.setdefault(child, []).append(name)
    for child, mine in children.items():
        path = prefix + child
        while path not in mine and len({n.removeprefix(f"{path}.").split(".")[0] for n in mine}) == 1:
            step = mine[0].removeprefix(f"{path}.").split(".")[0]
            path = f"{path}.{step}"
        below = branch.add(_line(path.removeprefix(prefix), numbers(network, mine)))
        if path not in mine:
            _modules(below, network, mine, f"{path}.", depth - 1)
