"""Runs every fixture of a folder through our own loaders and forward passes, a line for each output.

A file of this package is named after its family or reward and has a dictionary RUN: item -> a function
that takes the Fixture and returns our outputs by name. Run as `make parity FIXTURES=folder`.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .fixtures import Fixture, error, read

Run = Callable[[Fixture], dict[str, Tensor]]
_OURS = {"__init__", "__main__", "fixtures"}


def runners() -> dict[str, Run]:
    """What computes each item."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _OURS)
    return {item: run for name in names for item, run in importlib.import_module(f".{name}", __package__).RUN.items()}


def compare(fixture: Fixture, run: Run) -> list[tuple[str, float, bool]]:
    """Output, error and whether it is within tolerance; every expected output must be computed.

    Raises:
        ValueError: the fixture expects nothing.
    """
    if not fixture.outputs:
        raise ValueError("it has no outputs")
    with torch.no_grad():
        ours = run(fixture)
    results = []
    for name, reference in sorted(fixture.outputs.items()):
        found = error(reference, ours[name]) if name in ours else float("inf")
        results.append((name, found, found <= fixture.tolerance(name)))
    return results


def report(path: Path, known: dict[str, Run]) -> bool | None:
    """Print how a fixture fares, and whether all of it is within tolerance; None where nothing here computes it."""
    try:
        fixture = read(path)
        if fixture.item not in known:
            print(f"{fixture.name}: skipped, nothing here computes {fixture.item}")
            return None
        results = compare(fixture, known[fixture.item])
    except Exception as problem:  # whatever is wrong with one fixture, the others are compared
        print(f"{path.stem}: NOT ok, {type(problem).__name__}: {problem}", flush=True)
        return False
    good = all(ok for _, _, ok in results)
    worst, found, _ = max(results, key=lambda result: result[1])
    print(f"{fixture.name}: largest error {found:.2e} ({worst}), {'ok' if good else 'NOT ok'}", flush=True)
    for name, found, ok in results:
        if not ok:
            wrong = f"{found:.2e}" if math.isfinite(found) else "not computed here, not finite, or of another shape"
            print(f"  {name}: {wrong}, allowed {fixture.tolerance(name):.0e}")
    return good


def main() -> None:
    """Compare, and exit with 1 if anything differs or nothing was compared."""
    parser = argparse.ArgumentParser(prog="python -m vader_nodes.tools.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of NAME.safetensors and NAME.json pairs")
    folder, known = parser.parse_args().folder, runners()
    verdicts = [report(path, known) for path in sorted(folder.glob("*.safetensors"))]
    compared = [verdict for verdict in verdicts if verdict is not None]
    if not compared:
        print(f"There is no fixture in {folder} that could be compared.")
    sys.exit(not compared or not all(compared))


if __name__ == "__main__":
    main()
