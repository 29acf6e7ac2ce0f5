"""A pass recorded as a CUDA graph: the GPU replays its hundreds of kernels without waiting for Python to launch each.

A graph is a fixed list of kernels on fixed memory. So the inputs of every call are copied to where those of the first
lay, and what comes out is copied away before the next call overwrites it. What is computed stays the same, up to the
rounding of the convolutions that cuDNN finds fastest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nrrdd_format.errors import first_line

Inputs = tuple[Tensor | None, ...]
Outputs = tuple[Tensor, ...]
Pass = Callable[..., Outputs]
"""From tensors, some of which may be left out, to tensors."""

WARM_UPS = 3
"""Calls before a recording: libraries choose their kernels, and torch.compile compiles, in the first ones."""


class Graphed:
    """Passes on one device; on a GPU each is recorded when it is first called with inputs of some shapes.

    Recordings share their memory, for they run one after the other. A build has at most two sizes of batches, hence
    two recordings of each pass. All are made on one stream beside the default one, on which recording does not work:
    torch gives what one stream has used to no other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recordings: dict[object, _Recording] = {}
        self._refused: set[Pass] = set()
        self._beside: torch.cuda.Stream | None = None
        self._memory: Any = None  # the pool of the first recording; its type has changed between versions of torch

    def __call__(self, function: Pass, *inputs: Tensor | None) -> Outputs:
        """What `function` gives for `inputs`; it must be the same object in every call, and wait for no result."""
        if self._device.type != "cuda" or function in self._refused:
            return function(*inputs)
        key = (function, tuple(None if each is None else (each.shape, each.stride(), each.dtype) for each in inputs))
        if key not in self._recordings:
            try:
                self._recordings[key] = self._record(function, inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                return self._give_up(function, inputs, error)
        return self._recordings[key].replay(inputs)

    def forget(self) -> None:
        """Gives back the memory of all recordings, which nothing else can use."""
        self._recordings.clear()
        self._memory = None

    def _record(self, function: Pass, inputs: Inputs) -> _Recording:
        fixed = tuple(None if each is None else each.detach().clone() for each in inputs)
        if self._beside is None:
            self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        usual, beside = torch.cuda.current_stream(self._device), self._beside
        beside.wait_stream(usual)
        graph = torch.cuda.CUDAGraph()
        try:
            with _fastest_convolutions():
                with torch.cuda.stream(beside):
                    for _ in range(WARM_UPS):
                        function(*fixed)
                usual.wait_stream(beside)
                with torch.cuda.graph(graph, pool=self._memory, stream=beside):
                    outputs = function(*fixed)
        finally:
            torch.cuda.set_stream(usual)  # torch 2.6 leaves the other one where a recording fails
        self._memory = graph.pool()
        return _Recording(graph=graph, inputs=fixed, outputs=outputs)

    def _give_up(self, function: Pass, inputs: Inputs, error: RuntimeError) -> Outputs:
        """Runs kernel by kernel what cannot be recorded, such as a network that looks at its own results."""
        torch.cuda.synchronize(self._device)
        outputs = function(*inputs)  # first, since an error that has other reasons shows here again
        self._refused.add(function)
        tqdm.write(
            f"a pass of the teacher cannot be recorded as a CUDA graph and runs more slowly: {first_line(error)}",
            file=sys.stderr,
        )
        return outputs


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its kernels in the first call and keeps the fastest; the shapes stay the same for hours."""
    usual = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = usual


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recording:
    """A graph, and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    outputs: Outputs

    def replay(self, inputs: Inputs) -> Outputs:
        for fixed, given in zip(self.inputs, inputs, strict=True):
            if fixed is not None and given is not None:
                fixed.copy_(given.detach())  # pixels under jitter have a history, which would grow with every step
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)
