"""The command line: run a workflow without ComfyUI, predict the memory that it needs, or list the nodes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, estimate, graph, host, validate, workflow
from .vader_backend.config import InputError
from .vader_backend.trainer import TrainingError

_PACK = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: training failed; 2: bad input; 130: interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except InputError as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail(
            "Stopped. Run the same command again: an interrupted training goes on from its last checkpoint.", 130
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vader_nodes", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="run | estimate | nodes")
    for name, command, help in (
        ("run", _run, "run an API-format workflow"),
        ("estimate", _estimate, "predict the device memory of an API-format workflow's trainings, for each preset"),
    ):
        run = commands.add_parser(name, help=help)
        run.add_argument("workflow", type=Path, help="file in API format, such as workflows/api/quickstart.json")
        run.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="settings",
                         help="change an input; NODE is an id, a class or a title; may be repeated")  # fmt: skip
        run.add_argument("--base-directory", type=Path, default=Path(),
                         help="folder of models/, input/ and output/; default: the current one")  # fmt: skip
        run.set_defaults(command=command)
    nodes = commands.add_parser("nodes", help="list the nodes with their inputs")
    nodes.add_argument("names", nargs="*", metavar="NODE", help="only these classes; default: all")
    nodes.set_defaults(command=_nodes)
    return parser


def _run(options: argparse.Namespace) -> None:
    graph.run(_workflow(options), NODE_CLASS_MAPPINGS, say=_say)


def _estimate(options: argparse.Namespace) -> None:
    estimate.estimate_workflow(_workflow(options), NODE_CLASS_MAPPINGS, _say)


def _workflow(options: argparse.Namespace) -> dict[str, workflow.Node]:
    """The workflow that the options name, with their changes."""
    if not options.base_directory.is_dir():
        raise InputError(f"--base-directory {options.base_directory} is not a folder; create it or name another.")
    host.use_base_directory(options.base_directory.resolve())
    path = options.workflow
    if not path.exists() and not path.is_absolute() and (_PACK / path).exists():
        path = _PACK / path  # the shipped workflows, from any folder
    nodes = workflow.load(path)
    workflow.override(nodes, options.settings, NODE_CLASS_MAPPINGS)
    return nodes


def _nodes(options: argparse.Namespace) -> None:
    validate.known(options.names, NODE_CLASS_MAPPINGS)
    for name in options.names or NODE_CLASS_MAPPINGS:
        cls = NODE_CLASS_MAPPINGS[name]
        _say(f"{name}: {NODE_DISPLAY_NAME_MAPPINGS[name]}\n    {cls.DESCRIPTION}")
        for section in ("required", "optional"):
            for key, entry in cls.INPUT_TYPES().get(section, {}).items():
                _say(f"    {_described(key, entry, required=section == 'required')}")
        _say(f"    -> {', '.join(cls.RETURN_TYPES)}\n")


def _described(name: str, entry: tuple[Any, dict[str, Any]], *, required: bool) -> str:
    kind, options = entry
    words = [f"choice of {', '.join(kind)}" if isinstance(kind, list) else kind]
    if "default" in options:
        words.append(f"default {options['default']!r}")
    if "min" in options or "max" in options:
        words.append(f"{options.get('min', '-')} to {options.get('max', '-')}")
    if required:
        words.append("required")
    return f"{name} ({'; '.join(words)}): {options.get('tooltip', '')}"


def _say(text: str) -> None:
    if host.is_main():
        print(text, flush=True)


def _fail(message: str, code: int) -> int:
    if host.is_main():
        print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
