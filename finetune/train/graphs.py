"""CUDA graphs of the parts of a training step.

A step of a small network is thousands of kernels of a few microseconds each, which the host cannot launch as
fast as a GPU runs them. A part that always launches the same kernels is run once as usual, which builds and
tunes what it needs, and captured at its second call; from then on one launch replays all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger("finetune.train")

CPU = torch.device("cpu")


class Graphs:
    """Run functions of tensors, on CUDA by replaying a graph of each if `enabled`.

    A function must launch the same kernels whenever it is called with the same key, and must not wait for the
    device. Whatever else it reads or writes must keep its address in memory. Random numbers
    come from torch's default generator, as it is seeded when the function is called.
    """

    def __init__(self, device: torch.device = CPU, *, enabled: bool = False) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._device = device
        self._stream = torch.cuda.Stream(device) if self.enabled else None
        self.clear()

    def clear(self) -> None:
        """Forget all graphs: the memory that they use is about to be replaced."""
        # torch refuses a pool whose graphs are all gone.
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], Any]] = {}
        self._gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._phases: dict[str, list[torch.nn.Parameter]] = {}  # what gets a gradient in each phase
        self._settles = False  # a phase runs for the first time: its gradients may yet move in memory

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Run a block on the stream that graphs are captured on."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # what repairs the state after an error reads what was launched before it
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def run(self, key: Hashable, function: Callable[..., Any], **inputs: torch.Tensor) -> Any:
        """Return `function(**inputs)`, a tensor or None; without a graph if `key` is None."""
        if not self.enabled or key is None:
            return function(**inputs)
        if key not in self._graphs:
            if key not in self._seen or self._settles:
                self._seen.add(key)
                return function(**inputs)
            if not self._capture(key, function, inputs):
                return function(**inputs)
        graph, static, output = self._graphs[key]
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        return None if output is None else output.clone()

    def _capture(self, key: Hashable, function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> bool:
        """Capture a graph; on failure turn graphs off and warn."""
        generator = torch.cuda.default_generators[self._device.index or 0]
        before = generator.get_state()
        static, graph = {name: value.clone() for name, value in inputs.items()}, torch.cuda.CUDAGraph()
        try:
            # "thread_local": the thread that pins batches may call the driver meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = function(**static)
        except RuntimeError as error:
            self.enabled = False
            self._graphs.clear()  # frees their memory
            # A capture that failed leaves the state of the generator captured: give it another one.
            fresh = torch.Generator(self._device)
            fresh.set_state(before)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            log.warning("CUDA graphs are off: %s cannot be captured: %s", key, str(error).splitlines()[0])
            return False
        self._graphs[key] = graph, static, output
        return True

    def clear_gradients(self, phase: str, network: torch.nn.Module) -> None:
        """Drop the gradients of a network; those whose memory belongs to a graph become zeros instead."""
        kept = self._phases.get(phase, ()) if self.enabled else ()
        self._settles = self.enabled and phase not in self._phases
        for parameter in network.parameters():
            parameter.grad = None
        for parameter in kept:
            parameter.grad = self._gradients[parameter].zero_()

    def keep_gradients(self, phase: str, network: torch.nn.Module) -> None:
        """Keep the memory of the gradients that the first run of a phase has left, for its graphs."""
        self._settles = False
        if not self.enabled or phase in self._phases:
            return
        self._phases[phase] = []
        for parameter in network.parameters():
            if parameter.grad is not None:
                kept = self._gradients.setdefault(parameter, parameter.grad)
                if kept is not parameter.grad:
                    parameter.grad = kept.copy_(parameter.grad)
                self._phases[phase].append(parameter)
