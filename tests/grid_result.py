"""A cell's result as tests need it."""

from __future__ import annotations

from benchmarks.grid import Cell, Result


def result_of(cell: Cell, top1: float) -> Result:
    """What a cell of a grid came to; of before origin, precision and versions were recorded."""
    return Result(
        dataset="digits",
        ipc=cell.ipc,
        teacher="conv2",
        teacher_top1=None,
        student="conv2-w8",
        images=cell.images,
        labels=cell.labels,
        seed=cell.seed,
        epochs=2,
        stored_epochs=2,
        iterations=1,
        build=dict(cell.build),
        student_options=dict(cell.student),
        top1=top1,
        test_images=10,
        bytes_images=1,
        bytes_labels=1.0,
        bytes_soft_labels=1.0,
        clipped_share=None,
        seconds=1.0,
    )
