"""Docstrings for the site: Sphinx roles, literal blocks and simple tables as Markdown."""

import re

import griffe

ROLE = re.compile(r":(?:py:)?(mod|class|func|meth|data|attr|exc|obj):`~?([^`]+)`")
RULE = re.compile(r"^ *=+( +=+)+ *$")


def markdown(text):
    """A docstring's text with what Sphinx reads in Markdown's words."""
    text = ROLE.sub(lambda m: f"`{m[2]}`" if not m[2].startswith("cut.") else f"[`{m[2]}`][{m[2]}]", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", text)
    lines, result, i = text.split("\n"), [], 0
    while i < len(lines):
        if RULE.match(lines[i]):
            rows, i = _table(lines, i)
            result += rows
        else:
            result.append(lines[i])
            i += 1
    return "\n".join(result)


def _table(lines, start):
    """The rows of a simple table as Markdown, and the line after it."""
    edges = [m.start() for m in re.finditer("=+", lines[start])]
    indent = " " * edges[0]
    rows, rules, i = [], 1, start + 1
    while rules < 3 and i < len(lines):
        if RULE.match(lines[i]):
            rules += 1
        else:
            rows.append([lines[i][a:b].strip() for a, b in zip(edges, [*edges[1:], None], strict=True)])
        i += 1
    head, *body = rows
    shown = [head, ["---"] * len(head), *body]
    return ["", *(indent + "| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in shown), ""], i


class Roles(griffe.Extension):
    """Changes every docstring as it is read."""

    def on_instance(self, *, obj, **kwargs):
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = markdown(obj.docstring.value)
