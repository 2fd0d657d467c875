"""The families are what they say: real pipelines, deterministic, and sensitive to all that goes in."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from . import FAMILIES, folder, tokenization
from .family import Family
from .quiet import quiet
from .reference import Call, arguments, difference, load, picture, recorded, run_alone, run_once

SHORT = "a red circle"
LONG = " ".join(tokenization.PROMPTS.split()[:40])
QUOTED = 'a sign that says "HELLO"'  # HunyuanVideo 1.5 gives quoted words to its second text encoder
LATENTS = ("hidden_states", "sample", "x")
# With one step a schedule stretched to a last value (`shift_terminal`) divides by zero.
FEW = {"num_inference_steps": 2}
NOTICEABLE = 1e-2  # stacking moves latents by 1e-6 to 1e-5 of their range


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def pipe(family: Family, root: Path) -> DiffusionPipeline:
    return load(folder(family.name, root))


@pytest.fixture(scope="module")
def calls(family: Family, pipe: DiffusionPipeline) -> list[Call]:
    """The denoiser calls of one job."""
    with recorded(pipe, *family.denoisers) as calls:
        run_once(pipe, seed=1, output_type="latent", **arguments(family, QUOTED))
    return calls


def test_folder_loads_as_the_real_class_in_fp32_and_is_small(
    family: Family, pipe: DiffusionPipeline, root: Path
) -> None:
    assert type(pipe).__name__ == family.pipeline_class
    assert type(pipe.scheduler).__name__ == family.solver
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    size_bytes = sum(path.stat().st_size for path in folder(family.name, root).rglob("*") if path.is_file())
    assert size_bytes < (20e6 if family.name == "hunyuan-video-1.5" else 3e6)


def test_same_seed_gives_the_same_bytes(family: Family, pipe: DiffusionPipeline) -> None:
    first = run_alone(pipe, seed=1, **arguments(family, SHORT))
    again = run_once(pipe, seed=1, output_type="np", **arguments(family, SHORT))
    assert again[0].tobytes() == first.frames.tobytes()
    assert first.latents.isfinite().all()
    assert np.isfinite(first.frames).all()
    assert first.frames.std() > 0.05
    assert first.frames.ndim == (4 if family.media == "video" else 3)


def test_seed_and_prompts_change_the_latents(family: Family, pipe: DiffusionPipeline) -> None:
    def latents(prompt: str, seed: int, **changes: object) -> torch.Tensor:
        return run_once(pipe, seed=seed, output_type="latent", **arguments(family, prompt, **FEW, **changes))

    base = latents(SHORT, 1)
    assert difference(latents(SHORT, 2), base) > NOTICEABLE
    assert difference(latents("a blue square", 1), base) > NOTICEABLE
    assert difference(latents(LONG, 1), base) > NOTICEABLE
    if family.negative_prompt:
        assert difference(latents(SHORT, 1, negative_prompt="a dark street"), base) > NOTICEABLE
    if family.unguided:
        changes = family.unguided | ({"negative_prompt": None} if family.negative_prompt else {})
        assert difference(latents(SHORT, 1, **changes), base) > NOTICEABLE


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].image != "never"], indirect=True)
def test_picture_changes_the_latents(family: Family, pipe: DiffusionPipeline) -> None:
    def latents(image: object) -> torch.Tensor:
        return run_once(pipe, seed=1, output_type="latent", **arguments(family, SHORT, image=image, **FEW))

    base = latents(picture())
    assert difference(latents(picture(seed=1)), base) > NOTICEABLE
    assert difference(latents(picture(width=128)), base) > NOTICEABLE
    if family.image == "optional":
        assert difference(latents(None), base) > NOTICEABLE
    if family.many_images:
        assert difference(latents([picture(), picture(width=96, seed=1)]), base) > NOTICEABLE


def test_denoiser_answers_to_each_of_its_tensors(family: Family, pipe: DiffusionPipeline, calls: list[Call]) -> None:
    call = calls[0]
    forward = pipe.components[call.module].forward
    with torch.no_grad():
        for name, value in call.arguments.items():
            changed = _changed(value)
            if changed is None:
                continue
            result = forward(**{**call.arguments, name: changed})
            assert _apart(result, call.result) > 1e-3, name


def _changed(value: object) -> object | None:
    """Something else of the same shape and kind; None where there is no number in it."""
    match value:
        case torch.Tensor() if value.is_floating_point():
            return value.flatten().roll(1).reshape(value.shape) * 0.5 + 0.1
        case torch.Tensor() if value.dtype == torch.int64 and (value == 1).all():  # a mask that hides nothing
            return value - torch.arange(value.shape[-1]) % 2
        case torch.Tensor() if value.dtype == torch.int64:
            return value // 2 + 1
        case [torch.Tensor(), *_]:
            return type(value)(_changed(tensor) for tensor in value)
        case {**entries} if entries:
            return {name: _changed(tensor) for name, tensor in entries.items()}
    return None


def _apart(result: object, expected: object) -> float:
    """Mean deviation over standard deviation, of a tensor, or a tuple or list of them."""
    while not isinstance(result, torch.Tensor):
        result, expected = result[0], expected[0]
    return ((result - expected).abs().mean() / expected.std()).item()


def test_guidance_is_laid_out_as_declared(family: Family, pipe: DiffusionPipeline, calls: list[Call]) -> None:
    steps = family.call["num_inference_steps"]
    assert [_rows(call) for call in calls] == ([2] * steps if family.guidance == "rows" else [1] * 2 * steps)
    assert {call.module for call in calls} == set(family.denoisers)
    if family.unguided:
        changes = family.unguided | ({"negative_prompt": None} if family.negative_prompt else {})
        with recorded(pipe, *family.denoisers) as unguided:
            run_once(pipe, seed=1, output_type="latent", **arguments(family, SHORT, **changes))
        assert [_rows(call) for call in unguided] == [1] * steps


def _rows(call: Call) -> int:
    return len(_latents(call))


def _latents(call: Call) -> torch.Tensor | list[torch.Tensor]:
    return next(call.arguments[name] for name in LATENTS if name in call.arguments)


def test_wide_and_tall_differ_in_shape_unless_packed(family: Family, pipe: DiffusionPipeline) -> None:
    shapes = []
    for size in (family.wide, family.tall):
        with recorded(pipe, *family.denoisers) as calls:
            frames = run_once(pipe, seed=1, output_type="np", **arguments(family, SHORT, **FEW, **size))
        assert frames.shape[-3:-1] == (size["height"], size["width"])
        shapes.append(_latents(calls[0])[0].shape)
    wide, tall = shapes
    assert wide.numel() == tall.numel()
    assert (wide == tall) == family.packed


def test_tokenizers_are_the_same_after_saving(root: Path) -> None:
    loaded = load(folder("stable-diffusion-3", root))
    made = {"tokenizer": tokenization.clip(), "tokenizer_2": tokenization.clip(pad_token="!")}
    made["tokenizer_3"] = tokenization.t5()
    for name, tokenizer in made.items():
        assert loaded.components[name](LONG).input_ids == tokenizer(LONG).input_ids
        assert loaded.components[name].pad_token_id == tokenizer.pad_token_id
    gemma = load(folder("sana", root)).tokenizer
    assert gemma(SHORT).input_ids == tokenization.gemma()(SHORT).input_ids
    assert gemma(SHORT).input_ids[0] == gemma.bos_token_id


def test_prompt_templates_have_as_many_tokens_as_the_pipelines_drop() -> None:
    qwen = tokenization.qwen()
    assert len(qwen(tokenization.IMAGE_TEMPLATE).input_ids) == 34  # QwenImagePipeline
    assert len(qwen(tokenization.EDIT_TEMPLATE).input_ids) == 64  # QwenImageEditPlusPipeline
    assert len(qwen(tokenization.VIDEO_TEMPLATE).input_ids) == 108  # HunyuanVideo15Pipeline


def test_hunyuan_video_reads_quoted_words_with_its_second_encoder(root: Path) -> None:
    hunyuan = FAMILIES["hunyuan-video-1.5"]
    pipe = load(folder(hunyuan.name, root))
    with recorded(pipe, "text_encoder", "text_encoder_2") as calls:
        for prompt in (SHORT, QUOTED):
            run_once(pipe, seed=1, output_type="latent", **arguments(hunyuan, prompt, **FEW))
    assert [call.module for call in calls] == ["text_encoder"] * 3 + ["text_encoder_2", "text_encoder"]


def test_folder_is_the_same_however_often_and_by_how_many_it_is_built(tmp_path: Path) -> None:
    with quiet(), ThreadPoolExecutor(2) as pool:  # switches of the libraries belong to all threads
        built = list(pool.map(lambda root: folder("wan-2.1", root), [tmp_path / "a", tmp_path / "a", tmp_path / "b"]))
    assert built[0] == built[1] != built[2]
    assert built[0].name == "wan-2.1"
    assert _content(built[0]) == _content(built[2])
    assert [path.name for path in built[0].parent.iterdir()] == ["wan-2.1"]


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
