"""Whole iterations as one launch on a GPU, where launching small kernels takes most of the time."""

from collections.abc import Callable

import torch

from gipip.attacks.engines.traced import Traced

_WARM_UP = 3  # eager calls before the capture: they create the optimiser's state and cuDNN's plans


class Replay:
    """`step`, captured as a CUDA graph at its fourth call and replayed from then on.

    It must do the same work on the same tensors each time, without looking at values on
    the CPU, and return the same tensors.
    """

    def __init__(self, step: Callable[[], dict[str, torch.Tensor]]):
        self.step = step
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls <= _WARM_UP:
            return self._warm_up()
        if self.calls == _WARM_UP + 1:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.step()
        self.graph.replay()
        return {name: value.clone() for name, value in self.result.items()}

    def _warm_up(self) -> dict[str, torch.Tensor]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result


class Captured(Traced):
    """The traced gradient, in an attack whose steps are replayed."""

    name = "cudagraph"
    replayed = Replay
