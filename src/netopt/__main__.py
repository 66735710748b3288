"""The command line: ``netopt shrink SOURCE TARGET --max-params 0.7``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import netopt
from netopt import importance
from netopt.errors import NetoptError
from netopt.integrations.huggingface.inputs import TextBatches
from netopt.integrations.huggingface.pretrained import shrink_pretrained

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Of the command line; those of the process by default.

    Returns:
        The exit status: 0, or 1 where the command failed, with one sentence on the standard error. What is wrong on the
        command line itself exits with 2.
    """
    given = _parser().parse_args(arguments)
    try:
        report = _shrink(given)
    except NetoptError as error:
        sys.stderr.write(f"netopt: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("netopt: interrupted; nothing was written\n")
        return 1
    sys.stdout.write(f"{report}\n\nwritten to {given.target}\n")
    return 0


def _shrink(given: argparse.Namespace) -> Any:
    return shrink_pretrained(
        given.source,
        given.target,
        amount=given.amount,
        max_params=given.max_params,
        max_macs=given.max_macs,
        importance=given.importance,
        data=None if given.data is None else TextBatches(given.source, given.data),
        include=given.include,
        exclude=given.exclude,
        outputs=given.outputs,
        round_to=given.round_to,
        progress=not given.quiet,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("netopt", description="Make models smaller.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"netopt {netopt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shrink = commands.add_parser(
        "shrink",
        help="remove neurons of a Hugging Face model, folder to folder",
        description="Write a smaller model that from_pretrained loads. TARGET appears whole or not at all.",
        allow_abbrev=False,
    )
    shrink.add_argument("source", metavar="SOURCE", help="folder with config.json and safetensors files")
    shrink.add_argument("target", metavar="TARGET", help="folder to make; it must not exist")
    amounts = shrink.add_mutually_exclusive_group(required=True)
    amounts.add_argument("--max-params", type=float, metavar="F", help="keep at most this fraction of the parameters")
    amounts.add_argument("--max-macs", type=float, metavar="F", help="keep at most this fraction of the operations")
    amounts.add_argument("--amount", type=float, metavar="F", help="remove this fraction of the neurons")
    shrink.add_argument("--data", metavar="FILE", help="UTF-8 text that importance is measured on; loads the model")
    known = ", ".join(sorted({*importance.names("neurons"), *importance.names("weights")}))
    shrink.add_argument(
        "--importance", metavar="NAME", help=f"magnitude without data, saliency with it, or one of: {known}"
    )
    shrink.add_argument("--include", action="append", metavar="NAME", help="whose neurons may go; may be repeated")
    shrink.add_argument("--exclude", action="append", metavar="NAME", help="whose neurons all stay; may be repeated")
    shrink.add_argument("--outputs", action="append", metavar="NAME", help="results whose shape stays, such as logits")
    shrink.add_argument("--round-to", type=int, default=1, metavar="N", help="keep multiples of N neurons")
    shrink.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
