"""Architecture: the modules of ``cut`` in groups, who imports whom, and the drawing of it.

``docs/architecture.md`` holds the groups as a block of text; a test compares it with the imports of the code.

    python -m experiments.architecture     # draws docs/images/architecture.svg from the block
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

from cut.files import write_atomically

ROOT = Path(__file__).parent.parent
PAGE, DRAWING = ROOT / "docs/architecture.md", ROOT / "docs/images/architecture.svg"
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Group:
    """One idea of the package.

    Attributes:
        name: One word.
        modules: Names below ``cut.``; ``data.*`` is a whole package, ``cut`` the front door itself.
        uses: The groups that it imports.
        says: What it is for, in a few words.
    """

    name: str
    modules: tuple[str, ...]
    uses: tuple[str, ...]
    says: str

    def holds(self, module: str) -> bool:
        """Whether a full name such as ``cut.data.rooms`` belongs to it."""
        short = module.removeprefix("cut.")
        return any(short == m or (m.endswith(".*") and f"{short}.".startswith(m[:-1])) for m in self.modules)


def groups(text: str) -> list[Group]:
    r"""The groups of the page's block, lowest layer first.

    A group is a line ``name: what it is for``, then indented lines of modules, then ``-> groups that it imports``.

    Raises:
        ValueError: If there is no block, or a group has no modules.

    Example:
        >>> groups("```groups\na: first\n  x y\nb: second\n  z\n  -> a\n```")[1]
        Group(name='b', modules=('z',), uses=('a',), says='second')
    """
    block = re.search(r"```groups\n(.*?)```", text, re.DOTALL)
    if block is None:
        raise ValueError("the page has no block of ```groups")
    found: list[Group] = []
    for part in re.split(r"\n(?=\S)", block[1].strip()):
        head, *lines = part.splitlines()
        name, _, says = head.partition(":")
        words, _, uses = " ".join(lines).partition("->")
        if not words.split():
            raise ValueError(f"group {name!r} names no modules")
        found.append(Group(name.strip(), tuple(words.split()), tuple(uses.split()), says.strip()))
    return found


def modules(package: Path = ROOT / "cut") -> dict[str, Path]:
    """Full name of every module of a package to its file."""
    names = {".".join(p.relative_to(package.parent).with_suffix("").parts): p for p in sorted(package.rglob("*.py"))}
    return {n.removesuffix(".__init__"): p for n, p in names.items()}


def imports(path: Path, known: Mapping[str, Path], deferred: bool = True) -> set[str]:
    """The known modules that a file imports, those only for type checkers left out.

    Args:
        path: A Python file.
        known: Modules by full name; ``from cut import masks`` counts as ``cut.masks``.
        deferred: Count imports inside functions too, which run when the function is called.
    """
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text()), deferred):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return found & set(known)


def _statements(node: ast.AST, deferred: bool) -> Iterator[ast.AST]:
    """The nodes that run when a module is loaded, or also when its functions are called."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if not deferred and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _statements(child, deferred)


def between(members: list[Group], deferred: bool = True) -> Graph:
    """Group to the other groups that its modules import.

    Raises:
        ValueError: Naming a module that is in no group, or in two.
    """
    known = modules()
    owner: dict[str, str] = {}
    for module in known:
        holders = [g.name for g in members if g.holds(module)]
        if len(holders) != 1:
            raise ValueError(f"module {module!r} is in groups {holders}; every module belongs to one")
        owner[module] = holders[0]
    graph: Graph = {g.name: set() for g in members}
    for module, path in known.items():
        graph[owner[module]] |= {owner[m] for m in imports(path, known, deferred)} - {owner[module]}
    return graph


def reduced(graph: Graph) -> Graph:
    """The arrows that no longer path implies.

    Example:
        >>> reduced({"a": set(), "b": {"a"}, "c": {"a", "b"}})["c"]
        {'b'}
    """
    below: Graph = {}
    for name in TopologicalSorter(graph).static_order():
        below[name] = set().union(graph[name], *(below[u] for u in graph[name]))
    return {n: {u for u in used if not any(u in below[v] for v in used)} for n, used in graph.items()}


def layers(graph: Graph) -> list[list[str]]:
    """The groups in layers: each one above all that it imports, as low as it can be."""
    level: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        level[name] = 1 + max((level[u] for u in graph[name]), default=-1)
    return [[n for n in graph if level[n] == i] for i in range(max(level.values()) + 1)]


STYLE = """
text { font: 15px system-ui, "Segoe UI", Roboto, sans-serif; fill: #1f2933; }
.name { font-weight: 600; font-size: 16px; } .says { font-size: 12.5px; fill: #52606d; }
.box { fill: #eef2ff; stroke: #4c51bf; stroke-width: 1.4; } .arrow { stroke: #7b8794; stroke-width: 1.5; fill: none; }
.tip { fill: #7b8794; } .back { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  text { fill: #f5f7fa; } .says { fill: #cbd2d9; } .box { fill: #2d3561; stroke: #a3bffa; }
  .arrow { stroke: #9aa5b1; } .tip { fill: #9aa5b1; } .back { fill: #1b2030; }
}
"""
BOX, LANE, HIGH, GAP, STEP = 200, 16, 58, 26, 108
Item = tuple[str, str]  # (group, "") is a box; (group, imported group) a lane that an arrow takes through a layer


def rows_of(graph: Graph) -> list[list[Item]]:
    """The layers from the top, boxes and lanes, ordered so that few arrows cross."""
    level = {n: i for i, row in enumerate(layers(graph)) for n in row}
    rows: list[list[Item]] = [[] for _ in range(max(level.values()) + 1)]
    for name, at in level.items():
        rows[at].append((name, ""))
        for used in sorted(graph[name]):
            for between_ in range(level[used] + 1, at):
                rows[between_].append((name, used))
    for sweep in range(8):
        for i in range(1, len(rows)) if sweep % 2 == 0 else range(len(rows) - 2, -1, -1):
            other = rows[i - 1 if sweep % 2 == 0 else i + 1]
            place = {item: (j + 0.5) / len(other) for j, item in enumerate(other)}
            rows[i] = _sorted(rows[i], place, graph)
    return rows[::-1]


def _sorted(row: list[Item], place: Mapping[Item, float], graph: Graph) -> list[Item]:
    """A layer by the mean place of what each item is joined to in the layer next to it."""
    mean = {}
    for j, item in enumerate(row):
        near = [x for other, x in place.items() if _joined(item, other, graph) or _joined(other, item, graph)]
        mean[item] = sum(near) / len(near) if near else (j + 0.5) / len(row)
    return sorted(row, key=lambda item: mean[item])


def _joined(upper: Item, lower: Item, graph: Graph) -> bool:
    """Whether one item of a layer leads straight to one of the layer below, or the other way round."""
    (name, used), (below, through) = upper, lower
    if used and through:
        return upper == lower
    if used:
        return used == below
    return name == below if through else below in graph[name]


def svg(members: list[Group]) -> str:
    """The drawing: groups in layers, imports point down; an arrow that a longer path implies is left out."""
    graph = reduced({g.name: set(g.uses) for g in members})
    rows = rows_of(graph)
    widths = [sum(LANE if used else BOX for _, used in row) + GAP * (len(row) - 1) for row in rows]
    width, height = max(widths) + 2 * GAP, len(rows) * STEP - (STEP - HIGH) + 2 * GAP
    centre: dict[tuple[int, Item], float] = {}
    for i, row in enumerate(rows):
        x = (width - widths[i]) / 2
        for item in row:
            wide = LANE if item[1] else BOX
            centre[i, item] = x + wide / 2
            x += wide + GAP
    level = {name: i for i, row in enumerate(rows) for name, used in row if not used}
    edges = [(n, u) for n, used in graph.items() for u in sorted(used)]
    paths = [_path(edge, edges, level, centre) for edge in edges]
    boxes = [_box(g.name, g.says, centre[level[g.name], (g.name, "")], GAP + level[g.name] * STEP) for g in members]
    label = "The groups of modules of cut in layers; arrows point from a group to what it imports"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">\n'
        f'<style>{STYLE}</style>\n<rect class="back" width="{width}" height="{height}" rx="8"/>\n'
        '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">'
        '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n' + "\n".join(paths + boxes) + "\n</svg>\n"
    )


def _path(
    edge: tuple[str, str],
    edges: list[tuple[str, str]],
    level: Mapping[str, int],
    centre: Mapping[tuple[int, Item], float],
) -> str:
    """An arrow from box to box, straight down the lanes between; arrows of one box start and end side by side."""
    name, used = edge
    top, bottom = level[name], level[used]
    lanes = [centre[i, edge] for i in range(top + 1, bottom)]
    ends = centre[top, (name, "")], centre[bottom, (used, "")]
    # Seen from either box, its arrows are spread in the order of where they lead.
    out = sorted((centre[top + 1, e if level[e[1]] > top + 1 else (e[1], "")], e) for e in edges if e[0] == name)
    into = sorted((centre[bottom - 1, e if level[e[0]] < bottom - 1 else (e[0], "")], e) for e in edges if e[1] == used)
    x = ends[0] + 22 * ([e for _, e in out].index(edge) - (len(out) - 1) / 2)
    last = ends[1] + 22 * ([e for _, e in into].index(edge) - (len(into) - 1) / 2)
    y = GAP + top * STEP + HIGH
    d = f"M{x:g} {y:g}"
    for i, lane in enumerate([*lanes, last], top + 1):
        end = GAP + i * STEP - (2 if i == bottom else 0)
        middle = (y + end) / 2
        d += f" C{x:g} {middle:g} {lane:g} {middle:g} {lane:g} {end:g}"
        x, y = lane, end + HIGH
        d += "" if i == bottom else f" V{y:g}"
    return f'<path class="arrow" marker-end="url(#tip)" d="{d}"/>'


def _box(name: str, says: str, middle: float, y: float) -> str:
    """A box with the group's name and what it is for."""
    return (
        f'<rect class="box" x="{middle - BOX / 2:g}" y="{y:g}" width="{BOX}" height="{HIGH}" rx="8"/>'
        f'<text class="name" x="{middle:g}" y="{y + 25:g}" text-anchor="middle">{escape(name)}</text>'
        f'<text class="says" x="{middle:g}" y="{y + 44:g}" text-anchor="middle">{escape(says)}</text>'
    )


def main() -> int:
    """Draw the page's block."""
    write_atomically(DRAWING, svg(groups(PAGE.read_text())))
    print(DRAWING)
    return 0


if __name__ == "__main__":
    sys.exit(main())
