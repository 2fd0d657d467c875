"""Every format that diffusers loads gives the weights that diffusers gives, and nothing is dropped in silence."""

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline

from photogram.worker.lora.adapter import Adapter, build
from photogram.worker.lora.conversion import lora_modules
from photogram.worker.lora.names import LayerNames
from photogram.worker.lora.reading import read
from photogram.worker.lora.sets import Entry, ModuleLoras
from photogram.worker.lora.weights import ModuleWeights

from .files import Maker
from .formats import EXAMPLES

STRENGTH = 0.7
MAX_BYTES = 1 << 30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipelines(family_folder):
    """Return the pipeline of a family, loaded once; for reading only."""
    loaded = {}

    def of(family: str) -> DiffusionPipeline:
        if family not in loaded:
            loaded[family] = DiffusionPipeline.from_pretrained(family_folder(family))
        return loaded[family]

    return of


def load(path, pipeline) -> Adapter:
    return build("test", str(path), read(str(path), MAX_BYTES), pipeline, LayerNames(pipeline, lora_modules(pipeline)))


def merged(adapter: Adapter, pipeline: DiffusionPipeline, strength: float = STRENGTH) -> dict[str, torch.Tensor]:
    """Return copies of the changed parameters with the adapter merged; the pipeline is left as it was."""
    found = {}
    for module in adapter.changes:
        network = pipeline.components[module]
        weights = ModuleWeights(module, network, CPU)
        weights.switch(ModuleLoras((Entry(adapter=adapter, part=module, strength=strength),)))
        found |= {f"{module}.{name}": network.get_parameter(name).clone() for name in adapter.changes[module]}
        weights.switch(ModuleLoras())
    return found


def merged_by_diffusers(path, pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Return all parameters after diffusers' own loading and fusing, layers' names as they were before."""
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora(
        components=[name for name in lora_modules(pipeline) if name != "transformer_2"], lora_scale=STRENGTH
    )
    return {
        f"{module}.{name.replace('.base_layer', '')}": parameter.detach().clone()
        for module in lora_modules(pipeline)
        for name, parameter in pipeline.components[module].named_parameters()
    }


@torch.inference_mode()
@pytest.mark.parametrize("name", EXAMPLES)
def test_format_gives_the_weights_that_diffusers_gives(name, pipelines, family_folder, tmp_path):
    example = EXAMPLES[name]
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(example.make(Maker()), path)
    pipeline = pipelines(example.family)
    adapter = load(path, pipeline)
    assert {module: set(changes) for module, changes in adapter.changes.items()} == {
        module: set(names) for module, names in example.changes.items()
    }
    ours = merged(adapter, pipeline)
    if name.startswith("peft"):
        # diffusers knows these names only without peft's own prefix.
        tensors = {key.replace("base_model.model.", "transformer."): t for key, t in example.make(Maker()).items()}
        safetensors.torch.save_file(tensors, path)
    theirs = merged_by_diffusers(path, DiffusionPipeline.from_pretrained(family_folder(example.family)))
    plain = {
        f"{module}.{parameter}": value
        for module in lora_modules(pipeline)
        for parameter, value in pipeline.components[module].named_parameters()
    }
    for parameter, value in ours.items():
        torch.testing.assert_close(value, theirs[parameter], rtol=1e-5, atol=1e-5)
        assert (value - plain[parameter]).abs().max() > 1e-3
    changed = {key for key, value in plain.items() if not torch.equal(value, theirs[key])}
    assert changed == ours.keys(), "diffusers changes other parameters than we do"
