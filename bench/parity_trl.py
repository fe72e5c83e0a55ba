"""Our losses against those of TRL, on the same tensors: values and gradients.

    pip install "tokenmdp[bench]"
    python bench/parity_trl.py --json docs/results/parity_trl.json

TRL's side is its own code: the loss methods of its trainers, called with our tensors (trl_losses.py). Our side is
`functional`: an unreduced loss, summed under a weight. trl_rows.py pairs them. Every row of the first table is measured
on `--draws` random draws; it agrees if the values differ by at most 1e-5 (of the largest entry, where that is above 1)
and the gradients in the log-probabilities or scores by at most 1e-5 of their largest entry. The second table has the
losses that differ on purpose: by how much, and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import common

if TYPE_CHECKING:  # it needs TRL, and where that is missing the bench says so
    from trl_rows import Draw, Row

TOLERANCE = 1e-5


def measure(row: Row, draws: Sequence[Draw]) -> dict[str, Any]:
    """The largest differences over the draws, and both values on the first of them."""
    value = gradient = 0.0
    shown: list[float] = []
    for seed, d in enumerate(draws):
        found = []
        for side in (row.ours, row.theirs):
            at = getattr(d, row.of).clone().requires_grad_(not row.no_gradient)
            result = side(d, at)
            slope = None if row.no_gradient else torch.autograd.grad(result.sum(), at)[0]
            if slope is not None and row.of == "logp":  # what no action stands behind is 0 whatever is learned
                slope = torch.where(d.action, slope, 0.0)
            found.append((result.detach(), slope))
        (ours, our_slope), (theirs, their_slope) = found
        value = max(value, difference(ours, theirs, max(1.0, float(theirs.abs().max()))))
        if our_slope is not None and their_slope is not None:
            steepest = float(their_slope.abs().max())
            if steepest == 0:
                raise ValueError(f"{row.name}: TRL's loss has no gradient here, so there is nothing to compare with")
            gradient = max(gradient, difference(our_slope, their_slope, steepest))
        if seed == 0:
            shown = [float(x.double().mean()) for x in (ours, theirs)]
    out: dict[str, Any] = {"peer": row.peer, "ours": round(shown[0], 7), "theirs": round(shown[1], 7)}
    if not row.gradient_only:
        out["difference"] = value
    if not row.no_gradient:
        out["gradient_difference"] = gradient
    if row.why:
        return {**out, "why": row.why}
    return {**out, "agrees": max(out.get("difference", 0.0), gradient) <= TOLERANCE}


def difference(ours: Tensor, theirs: Tensor, unit: float) -> float:
    """The largest difference of two arrays.

    Raises:
        ValueError: they are not of one shape.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"ours has the shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}: not the same quantity")
    return float((ours - theirs).abs().max()) / unit


def show(found: dict[str, Any]) -> None:
    """Both tables."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for title, part in (("the same", found["equal"]), ("different on purpose", found["on_purpose"])):
        table = Table(title=f"{title}: tokenmdp and TRL {found['_meta']['versions']['trl']}", title_justify="left")
        for name in ("", "TRL", "value differs by", "gradient by", ""):
            table.add_column(name)
        for name, row in part.items():
            numbers = [f"{row[k]:.1e}" if k in row else "–" for k in ("difference", "gradient_difference")]
            table.add_row(name, row["peer"], *numbers, row.get("why", "" if row.get("agrees") else "DISAGREES"))
        console.print(table)
    for name, why in found["absent"].items():
        console.print(f"not compared: {name}: {why}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--draws", type=int, default=20, help="random tensors every loss is compared on")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = out.parse_args(argv)
    if args.draws < 1:
        out.error(f"--draws is {args.draws}; at least one is needed")
    try:
        import trl

        import trl_rows
    except ImportError as fault:
        raise SystemExit(
            f"TRL cannot be imported ({fault}): it is needed for this bench only, install it by `pip install "
            '"tokenmdp[bench]"`'
        ) from fault
    draws = [trl_rows.Draw.make(seed) for seed in range(args.draws)]
    measured = [(row, measure(row, draws)) for row in trl_rows.rows()]
    found: dict[str, Any] = {
        "_meta": {
            "command": common.command(),
            "versions": {**common.versions(), "trl": trl.__version__},
            "draws": args.draws,
            "dtype": "float32",
            "tolerance": TOLERANCE,
        },
        "equal": {row.name: result for row, result in measured if not row.why},
        "on_purpose": {row.name: result for row, result in measured if row.why},
        "absent": trl_rows.ABSENT,
    }
    common.write(args.json, found)
    show(found)
    wrong = [name for name, row in found["equal"].items() if not row["agrees"]]
    if wrong:
        raise SystemExit(f"these disagree by more than {TOLERANCE:g}: {', '.join(wrong)}")
    return found


if __name__ == "__main__":
    main()
