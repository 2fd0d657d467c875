"""What switching LoRAs costs on a FLUX.1-sized transformer: merged in place here, against diffusers' load and fuse.

    python benchmarks/lora_switch.py            # 12B parameters, bf16, on a GPU
    python benchmarks/lora_switch.py --tiny     # anywhere, to see that it runs

Random weights, every linear layer changed. Medians of `--repeats` switches between two LoRAs that are loaded; each time
ends when the device is done. Checked on the way: restored weights are the base's bits, and a compiled block is not
compiled again. The same with the transformer's weights in the host's memory (CPU offload) comes last.
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

TINY = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


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


def seconds(device: torch.device, act: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def digest(transformer: FluxTransformer2DModel, device: torch.device) -> list[int]:
    """A sum of each parameter's bits and of those shifted by their place: cheap, and other for other bits."""
    sums = []
    for parameter in transformer.parameters():
        bits = parameter.data.to(device).view(torch.int16).flatten().long()
        place = torch.arange(bits.numel(), device=device) % 1009 + 1
        sums.append(int((bits * place).sum()))
    return sums


def ours(
    transformer: FluxTransformer2DModel, adapters: list[Adapter], device: torch.device, repeats: int
) -> dict[str, float]:
    weights = ModuleWeights("transformer", transformer, device)
    sets = [ModuleLoras((Entry(adapter=adapter, part="transformer", strength=0.8),)) for adapter in adapters]
    before = digest(transformer, device)
    first = seconds(device, lambda: weights.switch(sets[0]))
    switches = [seconds(device, lambda i=i: weights.switch(sets[i % 2])) for i in range(1, repeats + 1)]
    unmerge = seconds(device, lambda: weights.switch(BASE))
    assert digest(transformer, device) == before, "the base was not restored bit for bit"
    merge = [seconds(device, lambda: (weights.switch(sets[0]), weights.switch(BASE))) for _ in range(3)]
    return {
        "first merge, with the copy of the base": first,
        "switch between two loaded": statistics.median(switches),
        "slowest of these": max(switches),
        "unmerge": unmerge,
        "merge and unmerge again": statistics.median(merge),
    }


def diffusers_own(pipeline: FluxPipeline, files: list[Path], device: torch.device, repeats: int) -> dict[str, float]:
    loads, fuses, unfuses, unloads = [], [], [], []
    for i in range(repeats):
        state = safetensors.torch.load_file(files[i % 2])
        loads.append(seconds(device, lambda state=state: pipeline.load_lora_weights(state, adapter_name="own")))
        fuses.append(seconds(device, lambda: pipeline.fuse_lora(components=["transformer"], lora_scale=0.8)))
        unfuses.append(seconds(device, lambda: pipeline.unfuse_lora(components=["transformer"])))
        unloads.append(seconds(device, pipeline.unload_lora_weights))
    found = {"load_lora_weights": loads, "fuse_lora": fuses, "unfuse_lora": unfuses, "unload_lora_weights": unloads}
    medians = {name: statistics.median(values) for name, values in found.items()}
    return medians | {"switch between two, all four": sum(medians.values())}


def count_compilations(transformer: FluxTransformer2DModel, adapters: list[Adapter], device: torch.device) -> int:
    """Return how often a compiled layer was compiled while LoRAs were switched under it: once."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    layer = transformer.single_transformer_blocks[0].proj_mlp
    compiled = torch.compile(layer, backend=backend)
    weights = ModuleWeights("transformer", transformer, device)
    hidden = torch.randn(4, layer.in_features, device=device, dtype=torch.bfloat16)
    results = []
    for adapter in [*adapters, *adapters]:
        weights.switch(ModuleLoras((Entry(adapter=adapter, part="transformer", strength=1.0),)))
        results.append(compiled(hidden).float().sum().item())
    weights.switch(BASE)
    assert results[0] != results[1], "the compiled layer did not see the switch"
    assert results[:2] == results[2:]
    return len(graphs)


def show(title: str, values: dict[str, float]) -> None:
    print(title)
    for name, value in values.items():
        print(f"  {name:42} {value * 1000:10.1f} ms")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a transformer of 2 + 2 blocks")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    transformer = make_transformer(device, options.tiny)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{name}, torch {torch.__version__}, {count / 1e9:.2f}B parameters in bf16")
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)
    with tempfile.TemporaryDirectory() as folder:
        for rank in options.ranks:
            files = [Path(folder) / f"{rank}-{i}.safetensors" for i in range(2)]
            for file in files:
                make_file(file, transformer, rank, device)
            names = LayerNames(pipeline, ["transformer"])
            started = time.perf_counter()
            adapters = [build(file.stem, str(file), read(str(file), 8 << 30), pipeline, names) for file in files]
            load_s = (time.perf_counter() - started) / len(files)
            layers, size_mb = len(adapters[0].changes["transformer"]), adapters[0].size_bytes / 1e6
            print(f"\nrank {rank}, {layers} layers, {size_mb:.0f} MB, read and checked in {load_s * 1000:.0f} ms")
            show("merged in place", ours(transformer, adapters, device, options.repeats))
            print(
                f"  compilations of a compiled layer           {count_compilations(transformer, adapters, device):10}"
            )
            show("diffusers' own", diffusers_own(pipeline, files, device, min(3, options.repeats)))
            if device.type == "cuda":
                transformer.to("cpu")
                show("merged in place, weights in the host's memory", ours(transformer, adapters, device, 3))
                transformer.to(device)


if __name__ == "__main__":
    main()
