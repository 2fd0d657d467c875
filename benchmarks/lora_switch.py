"""What switching LoRAs costs on a FLUX.1-sized transformer, wherever its weights live, against diffusers' own way.

    python benchmarks/lora_switch.py            # 12B parameters, bf16, on a GPU
    python benchmarks/lora_switch.py --tiny     # anywhere, to see that it runs: a CPU stands in for the device

Random weights, every linear layer changed, LoRAs that are loaded. Medians; each time ends when the device is done. The
weights are on the device, or offloaded by the classes that the server offloads with (`worker/residency`). Checked on
the way: restored weights are the base's bits, and a compiled layer is not compiled again. Prints a Markdown table.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging

from photogram.worker.lora.adapter import Adapter, build
from photogram.worker.lora.names import LayerNames
from photogram.worker.lora.reading import read
from photogram.worker.lora.sets import BASE, Entry, ModuleLoras
from photogram.worker.lora.weights import ModuleWeights
from photogram.worker.residency import Layerwise, Visitors

TINY = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}

Times = dict[str, float]
"""Seconds by what was done, in the order of the table."""


def make_transformer(device: torch.device, tiny: bool) -> FluxTransformer2DModel:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True, **(TINY if tiny else {}))
    transformer = transformer.to(torch.bfloat16).to_empty(device=device)
    for parameter in transformer.parameters():
        parameter.data.normal_(std=0.02)
    return transformer.requires_grad_(False)


def make_file(path: Path, transformer: FluxTransformer2DModel, rank: int, device: torch.device) -> None:
    tensors = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            for end, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                factor = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
                tensors[f"transformer.{name}.lora_{end}.weight"] = factor.cpu()
    safetensors.torch.save_file(tensors, path)


def load(files: list[Path], transformer: FluxTransformer2DModel) -> list[Adapter]:
    pipeline = pipeline_of(transformer)
    names = LayerNames(pipeline, ["transformer"])
    return [build(file.stem, str(file), read(str(file), 8 << 30), pipeline, names) for file in files]


def pipeline_of(transformer: FluxTransformer2DModel) -> FluxPipeline:
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)


class Bench:
    """One transformer, two LoRAs of each rank, and the times of what is done with them."""

    def __init__(self, device: torch.device, tiny: bool, files: dict[int, list[Path]], repeats: int) -> None:
        self.device = device
        self.files = files
        self.transformer = make_transformer(device, tiny)
        self.repeats = repeats
        for rank, pair in files.items():
            for file in pair:
                make_file(file, self.transformer, rank, device)
        started = time.perf_counter()
        self.sets = {
            rank: [
                ModuleLoras((Entry(adapter=adapter, part="transformer", strength=0.8),))
                for adapter in load(pair, self.transformer)
            ]
            for rank, pair in files.items()
        }
        self.load_s = (time.perf_counter() - started) / sum(map(len, files.values()))
        self.base = self._digest()

    def seconds(self, act: Callable[[], object]) -> float:
        self._settle()
        started = time.perf_counter()
        act()
        self._settle()
        return time.perf_counter() - started

    def median(self, *acts: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Do each in turn, `repeats` times in all; `before` each of them, which is not timed."""
        times = []
        for turn in range(self.repeats):
            before()
            times.append(self.seconds(acts[turn % len(acts)]))
        return statistics.median(times)

    def resident(self) -> dict[int, Times]:
        weights = ModuleWeights("transformer", self.transformer, self.device)
        found: dict[int, Times] = {}
        for rank, (one, other) in self.sets.items():
            times = found[rank] = {}
            if len(found) == 1:
                times["first merge of all"] = self.seconds(lambda one=one: weights.switch(one))
            weights.switch(one)
            times["switch"] = self.median(lambda o=other: weights.switch(o), lambda o=one: weights.switch(o))
            times["unmerge"] = self.seconds(lambda: weights.switch(BASE))
            self._check_base(weights)
        one, other = next(iter(self.sets.values()))
        assert self._compilations(weights, one, other) == 1
        return found

    def whole(self) -> dict[int, Times]:
        """--dit-cpu-offload."""
        weights = ModuleWeights("transformer", self.transformer, self.device)
        visitor = Visitors().add("transformer", self.transformer, self.device, pin=True, stays=True)
        weights.come_and_go(visitor)

        def come() -> None:
            with visitor.present():
                pass

        found: dict[int, Times] = {}
        for rank, (one, other) in self.sets.items():
            times = found[rank] = {}
            times["coming in as the base"] = self.median(come, before=visitor.leave)
            both = (lambda o=one: weights.switch(o), lambda o=other: weights.switch(o))
            times["switch while away, with coming in"] = self.median(*both, before=visitor.leave)
            times["coming in with what is merged"] = self.median(come, before=visitor.leave)
            weights.switch(other)
            times["switch while there"] = self.median(*both)
            times["unmerge while there"] = self.seconds(lambda: weights.switch(BASE))
            self._check_base(weights)
        with visitor.present():  # for the next way of keeping them
            for parameter in self.transformer.parameters():
                parameter.data = parameter.data.clone()
        return found

    def layerwise(self) -> dict[int, Times]:
        """--dit-layerwise-offload."""
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        weights = ModuleWeights("transformer", self.transformer, self.device)
        weights.wait_in(Layerwise(self.transformer, blocks, self.device, pin=True))
        found: dict[int, Times] = {}
        for rank, (one, other) in self.sets.items():
            times = found[rank] = {}
            if len(found) == 1:
                times["first merge of all"] = self.seconds(lambda one=one: weights.switch(one))
            weights.switch(one)
            times["switch"] = self.median(lambda o=other: weights.switch(o), lambda o=one: weights.switch(o))
            times["unmerge"] = self.seconds(lambda: weights.switch(BASE))
            self._check_base(weights)
        return found

    def diffusers(self) -> dict[int, Times]:
        """diffusers' own way, weights on the device. They are others afterwards: unfusing subtracts, and rounds."""
        found = {
            rank: {"switch: unfuse, unload, load, fuse": self._diffusers(pair)} for rank, pair in self.files.items()
        }
        self.base = self._digest()
        return found

    def _diffusers(self, files: list[Path]) -> float:
        pipeline, states = pipeline_of(self.transformer), [safetensors.torch.load_file(file) for file in files]

        def load_and_fuse(turn: int) -> None:
            pipeline.load_lora_weights(dict(states[turn % 2]), adapter_name="own")
            pipeline.fuse_lora(components=["transformer"], lora_scale=0.8)

        def unfuse_and_unload() -> None:
            pipeline.unfuse_lora(components=["transformer"])
            pipeline.unload_lora_weights()

        load_and_fuse(0)
        times = []
        for turn in range(1, 3):
            times.append(self.seconds(lambda turn=turn: (unfuse_and_unload(), load_and_fuse(turn))))
        unfuse_and_unload()
        return statistics.median(times)

    def _compilations(self, weights: ModuleWeights, one: ModuleLoras, other: ModuleLoras) -> int:
        """Return how often a compiled layer is compiled while LoRAs are switched under it."""
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            graphs.append(graph)
            return graph.forward

        layer = self.transformer.single_transformer_blocks[0].proj_mlp
        compiled = torch.compile(layer, backend=backend)
        hidden = torch.randn(4, layer.in_features, device=self.device, dtype=torch.bfloat16)
        results = []
        for loras in (one, other, one, other):
            weights.switch(loras)
            results.append(compiled(hidden).float().sum().item())
        weights.switch(BASE)
        assert results[0] != results[1], "the compiled layer did not see the switch"
        assert results[:2] == results[2:]
        return len(graphs)

    def _check_base(self, weights: ModuleWeights) -> None:
        with weights.changing():
            assert self._digest() == self.base, "the base was not restored bit for bit"

    def _digest(self) -> list[int]:
        """A sum of each parameter's bits and of those shifted by their place: cheap, and other for other bits."""
        sums = []
        for parameter in self.transformer.parameters():
            bits = parameter.data.to(self.device).view(torch.int16).flatten().long()
            place = torch.arange(bits.numel(), device=self.device) % 1009 + 1
            sums.append(int((bits * place).sum()))
        return sums

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def table(columns: list[int], rows: dict[str, dict[int, Times]]) -> str:
    """Return a Markdown table: one column for each rank, one row for everything that was timed."""
    lines = [f"| | {' | '.join(f'rank {rank}' for rank in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for where, by_rank in rows.items():
        for what in next(iter(by_rank.values())):  # the first rank's has all
            cells = [f"{by_rank[rank][what] * 1000:.0f} ms" if what in by_rank[rank] else "" for rank in columns]
            lines.append(f"| {where}: {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a transformer of 2 + 2 blocks")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    logging.set_verbosity_error()
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as folder:
        files = {rank: [Path(folder) / f"{rank}-{i}.safetensors" for i in range(2)] for rank in options.ranks}
        bench = Bench(device, options.tiny, files, options.repeats)
        count, layers = (
            sum(p.numel() for p in bench.transformer.parameters()),
            len(bench.sets[options.ranks[0]][0].layers),
        )
        rows = {
            "on the device": bench.resident(),
            "diffusers": bench.diffusers(),
            "`--dit-cpu-offload`": bench.whole(),
            "`--dit-layerwise-offload`": bench.layerwise(),
        }
    print(f"{name}, torch {torch.__version__}, {count / 1e9:.2f}B parameters in bf16, LoRAs on {layers} layers;")
    print(
        f"a LoRA is read and checked in {bench.load_s * 1000:.0f} ms; {time.perf_counter() - started:.0f} s in all.\n"
    )
    print(table(options.ranks, rows))


if __name__ == "__main__":
    main()
