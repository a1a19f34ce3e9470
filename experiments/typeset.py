"""Typeset: a table of texts as Markdown or LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"Δ": r"$\Delta$", "±": r"$\pm$", "°": r"$^\circ$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"},
}


@dataclass(frozen=True)
class Text:
    """One cell of a table."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table before it is Markdown or LaTeX; the first ``labels`` columns are left-aligned."""

    title: str
    head: list[str]
    body: list[list[Text]]
    labels: int


def markdown(table: Table) -> str:
    """The table as Markdown, without title and caption."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|" + "|".join([" --- "] * table.labels + [" ---: "] * (len(table.head) - table.labels)) + "|"
    body = [line([f"**{c.text}**" if c.bold else c.text for c in row]) for row in table.body]
    return "\n".join([line(table.head), rule, *body]) + "\n"


def escaped(text: str) -> str:
    r"""Plain text for LaTeX.

    Example:
        >>> print(escaped("50 % of a_b: -1 ± 2"))
        50 \% of a\_b: $-$1 $\pm$ 2
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(_LATEX.get(c, c) for c in text))


def latex(table: Table, note: str) -> str:
    """The table for LaTeX with the package booktabs; title and note are its caption."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    body = [line([rf"\textbf{{{escaped(c.text)}}}" if c.bold else escaped(c.text) for c in r]) for r in table.body]
    spec = "l" * table.labels + "r" * (len(table.head) - table.labels)
    parts = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.title)}. {escaped(note)}}}"]
    parts += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", line([escaped(h) for h in table.head]), r"\midrule"]
    return "\n".join([*parts, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"
