"""``cut export``: write a model as a file for another runtime, its outputs checked."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cut.commands import options
from cut.commands.terminal import Terminal, in_bytes

if TYPE_CHECKING:
    from cut.commands.source import Source
    from cut.conversion import Exported

TOLERANCE = 1e-3
SUFFIXES = (".onnx", ".pte")
EXAMPLES = """examples:
  cut export runs/small --out small.onnx
  cut export runs/small --out small.pte --int8     (ExecuTorch, for phones; needs the extra 'executorch')
  cut export mine:setup --weights runs/small --out small.onnx
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "export",
        help="write a model as an ONNX or ExecuTorch file",
        description="Write a model as a file for another runtime; every task's output is compared on pictures.",
        epilog=EXAMPLES,
    )
    options.add_source(parser)
    options.add_out(parser, "the file: .onnx, or .pte for ExecuTorch", file=True)
    parser.add_argument("--int8", action="store_true", help="weights and activations in int8, calibrated on pictures")
    parser.add_argument("--batches", type=options.whole(1), default=16, help="of calibration pictures (default: 16)")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export.

    Raises:
        ValueError: If there is no such model, the suffix is unknown, an extra is missing, or an output differs.
    """
    if args.out.suffix not in SUFFIXES:
        raise ValueError(f"--out {args.out}: allowed are {' and '.join(SUFFIXES)}")
    terminal = Terminal(args)
    from cut.commands.opening import open_source
    from cut.export import check_parity, parity

    source = open_source(args.source, args.weights, args.data, args.seed)
    terminal.say("converting ...")
    written = write(source, args.out, args.batches if args.int8 else 0)
    if args.int8:  # rounding is meant to differ; how much says what to expect
        worst = parity(args.out, source.network, [source.example])
    else:
        try:
            worst = check_parity(args.out, source.network, [source.example], TOLERANCE)
        except ValueError:
            args.out.unlink(missing_ok=True)  # no file that is known to be wrong is left
            raise
    facts = {
        "out": str(args.out),
        "tasks": source.tasks,
        "bytes": written.bytes,
        "opset": written.opset,
        "int8": args.int8,
        "max_abs_diff": worst,
    }
    kind = f"opset {written.opset}" if written.opset else "ExecuTorch"
    differ = ", ".join(f"{t} {d:.1e}" for t, d in worst.items())
    told = f"{args.out}: {in_bytes(written.bytes)}, {kind}; differs from PyTorch by at most {differ}"
    terminal.result(facts, told)


def write(source: Source, path: Path, calibration: int = 0) -> Exported:
    """Write a model as the kind of file that the suffix says.

    Args:
        source: The model.
        path: ``.onnx`` or ``.pte``.
        calibration: Batches of pictures for int8; 0 leaves floats.

    Raises:
        ValueError: If an extra is missing or the model cannot be exported.
    """
    from cut import executorch, export, quantisation

    pictures = source.inputs(calibration) if calibration else None
    image = source.example[:1]
    named: dict[str, Any] = {"tasks": source.tasks, "meta": source.meta}
    if path.suffix == ".pte":
        return executorch.export_executorch(source.network, path, image, **named, calibration=pictures)
    if pictures is None:
        return export.export_onnx(source.network, path, image, **named)
    with tempfile.TemporaryDirectory() as folder:
        whole = export.export_onnx(source.network, Path(folder) / "float.onnx", image, **named)
        return quantisation.quantise_onnx(whole.path, path, pictures)
