"""How far bfloat16 turns the gradient of refinement, term by term: `python -m benchmarks.gradient_cosine`.

A ReLU lets a gradient pass or stops it, and where bfloat16 rounds a feature to the other side of zero, it does the
other thing. So every gradient is taken a third time, in bfloat16 but with the decisions that float32 made: what is left
is what rounding does otherwise. Measured at a build's first step, on generated pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.builder_throughput import (
    SEED,
    add_teacher,
    make_eyes,
    pair_tables,
    pictures,
    refinement_settings,
    some_labels,
)
from benchmarks.command import add_device, run, whole
from benchmarks.results_io import markdown_table, provenance, write_report
from builders.cores import usable_cores
from builders.discovery import Eyes
from builders.label_refinement import MixDraws
from builders.passes import Passes

MODULE = "benchmarks.gradient_cosine"

NOTES = """\
Cosine: between a gradient by the pixels in bfloat16 and in float32, at the same pixels. *float32's decisions*: in
bfloat16, but every ReLU and max-pool lets through what it let through in float32. Decisions that differ: the share of a
layer's ReLUs that bfloat16 puts on the other side of zero, in the pass of the cross-entropy.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One term of the loss; `forced` is the cosine with float32's decisions."""

    term: str
    cosine: float
    forced: float


class Decisions(TorchFunctionMode):
    """Inside, ReLUs and max-pools keep what they let through in `made`, in order, or are `forced` to what another did.

    Attributes:
        made: for a ReLU its mask, bool like its input; for a max-pool the chosen places, int64 like its output.
    """

    def __init__(self, forced: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self._forced = forced

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("relu", "relu_"):
            return args[0] * self._decide(args[0] > 0)
        if name == "max_pool2d":
            _, places = F.max_pool2d(*args, **(kwargs | {"return_indices": True}))
            places = self._decide(places)
            return args[0].flatten(2).gather(2, places.flatten(2)).view(places.shape)
        return func(*args, **kwargs)

    def _decide(self, decision: Tensor) -> Tensor:
        self.made.append(decision)
        return decision if self._forced is None else self._forced[len(self.made) - 1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Compare gradients with those in float32.")
    add_teacher(parser)
    parser.add_argument("--batch-size", type=whole(2), default=16, metavar="B", help="images refined together (16)")
    parser.add_argument(
        "--threads", type=whole(1), default=usable_cores(), metavar="N", help="torch's threads (all cores)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-gradient-cosine-….{json,md} here")
    add_device(parser)
    return parser


def report(options: argparse.Namespace) -> int:
    """Measures, prints the table and writes what was asked for; returns the exit status."""
    torch.set_num_threads(options.threads)
    eyes, architecture = make_eyes(options)
    rows, differing = compare(eyes, options.size, options.batch_size)
    text = f"{table(rows)}\n\n{_differing_text(differing)}\n"
    print(f"{text}\n{NOTES}")
    if options.out is not None:
        state = "untrained" if options.teacher_checkpoint is None else "trained"
        shape = {"architecture": architecture, "trained": state == "trained", "size": options.size}
        measured = {"rows": [asdict(row) for row in rows], "differing_decisions": differing}
        write_report(
            options.out,
            f"gradient-cosine-{state}-{architecture}-{options.size}",
            provenance(MODULE, seeds=[SEED]),
            shape | {"batch_size": options.batch_size} | measured,
            title=f"Gradient in bfloat16: {state} {architecture}, {options.size} px, batch of {options.batch_size}",
            text=f"{text}\n{NOTES}",
        )
    return 0


def compare(eyes: Eyes, size: int, count: int) -> tuple[list[Row], list[float]]:
    """Rows of the terms and their weighted sum, and the share of decisions that differ in each ReLU, first to last."""
    settings = refinement_settings(iterations=1, batch_size=count)
    exact, rounded = (Passes(eyes, replace(settings, precision=precision)) for precision in ("fp32", "bf16"))
    pixels = eyes.see(pictures(count, size)).contiguous(memory_format=torch.channels_last)
    cases = zip(_losses(exact, pixels, size), _losses(rounded, pixels, size), strict=True)
    rows, sums, differing = [], [torch.zeros_like(pixels) for _ in range(3)], []
    for (term, weight, exact_loss), (_, _, rounded_loss) in cases:
        reference, other = Decisions(), Decisions()
        gradients = [
            _gradient(exact, exact_loss, pixels, reference),
            _gradient(rounded, rounded_loss, pixels, other),
            _gradient(rounded, rounded_loss, pixels, Decisions(reference.made)),
        ]
        rows.append(_row(term, gradients))
        sums = [total + weight * gradient for total, gradient in zip(sums, gradients, strict=True)]
        if term == "ce":
            differing = _differing(reference.made, other.made)
    return [*rows, _row("all", sums)], differing


def _losses(passes: Passes, pixels: Tensor, size: int) -> list[tuple[str, float, Callable[[Tensor], Tensor]]]:
    """The terms of the first step: name, weight, and the function of the pixels."""
    settings, labels = passes.settings, some_labels(len(pixels))
    targets = torch.from_numpy(labels).to(pixels.device)
    mixes = MixDraws(labels, pair_tables(size), SEED, 0).draw(0, pixels.device)
    return [
        ("ce", 1.0, lambda seen: passes.unmixed_losses(seen, targets)[0]),
        ("bn", settings.alpha_bn, lambda seen: passes.unmixed_losses(seen, targets)[1]),
        ("lr", settings.alpha_lr, lambda seen: passes.mixed_loss(seen, targets, mixes)),
    ]


def _gradient(passes: Passes, loss: Callable[[Tensor], Tensor], pixels: Tensor, decisions: Decisions) -> Tensor:
    pixels = pixels.detach().requires_grad_(True)
    with passes.batchnorm, decisions:
        value = loss(pixels)
    (gradient,) = torch.autograd.grad(value, pixels)
    return gradient


def _row(term: str, gradients: Sequence[Tensor]) -> Row:
    exact, *others = (gradient.double().flatten() for gradient in gradients)
    cosine, forced = (float(F.cosine_similarity(exact, other, dim=0)) for other in others)
    return Row(term=term, cosine=cosine, forced=forced)


def _differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """Of each pair of ReLU masks the share that differs."""
    masks = [pair for pair in zip(one, other, strict=True) if pair[0].dtype == torch.bool]
    return [float((a != b).float().mean()) for a, b in masks]


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    header = ["gradient of", "cosine", "with float32's decisions"]
    return markdown_table(header, [[row.term, f"{row.cosine:.4f}", f"{row.forced:.4f}"] for row in rows])


def _differing_text(differing: Sequence[float]) -> str:
    if not differing:
        return "The network has no ReLU."
    return (
        f"Decisions that differ: {differing[0]:.2%} in the first of {len(differing)} layers of ReLUs, "
        f"{differing[-1]:.2%} in the last."
    )


if __name__ == "__main__":
    raise SystemExit(main())
