"""Records a computation once as a CUDA graph and replays it on new inputs: no launch costs, whatever its length."""

from collections.abc import Callable

import torch

from .run import Run

Tensors = dict[str, torch.Tensor]


class Recorded:
    """A computation on inputs of fixed shapes; what it gives, it leaves in tensors of its own (gradients, meters).

    Nothing in it may wait for the device. On a CPU, or where recording fails, it is simply called.
    """

    def __init__(self, run: Run, compute: Callable[[Tensors], None], inputs: Tensors) -> None:
        self._compute = compute
        self._inputs = {key: value.clone() for key, value in inputs.items()}
        self._graph: torch.cuda.CUDAGraph | None = None
        if run.device.type != "cuda":
            return
        for _ in range(2):  # compiles, and fills every cache
            compute(self._inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=run.graph_pool(), stream=torch.cuda.current_stream()):
                compute(self._inputs)
            self._graph = graph
        except RuntimeError as error:
            run.log(f"not recorded: {error!r:.400}")
            torch.cuda.synchronize()

    def __call__(self, inputs: Tensors) -> None:
        for key, value in self._inputs.items():
            value.copy_(inputs[key], non_blocking=True)
        if self._graph is None:
            self._compute(self._inputs)
        else:
            self._graph.replay()
