"""What is served: `GET /models` in the seed's shape, `GET /v1/models` in OpenAI's, and SGLang's information routes."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import asdict, replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ... import __version__
from ...core.card import ModelCard
from ...core.errors import NotFound
from ...core.quality_mode import RECIPES, describe_mode
from ...engine import Engine
from ..answers import json_answer
from ..loras import Loras
from ..schemas import Model, ModelFacts, ModelInfo, ModelList, ServerInfo
from ..service import loaded_card

_DENOISERS = ("transformer", "unet", "prior", "decoder")
_VAES = ("vae", "vqvae", "movq", "audio_vae")


def model_routes(
    engine: Engine, loras: Loras, model_path: str, started_at: int, num_jobs: Callable[[], int]
) -> list[Route]:
    """Return the routes that describe the served model; those that need its card are 503 until it is loaded."""

    async def facts(request: Request) -> Response:
        return json_answer(facts_of(loaded_card(engine)))

    async def listing(request: Request) -> Response:
        card = loaded_card(engine)
        model = model_of(card, started_at)
        # As OpenAI and vLLM list fine-tuned models: a name of its own, and the model it is made from.
        nicknames = await loras.nicknames() if card.lora_modules else []
        ids = [f"{card.name}:{nickname}" for nickname in nicknames]
        return json_answer(ModelList(data=[model, *(replace(model, id=id, parent=model.id) for id in ids)]))

    async def one(request: Request) -> Response:
        card, asked = loaded_card(engine), request.path_params["model"]
        parent = None
        if asked not in (card.name, card.model_path):
            parent = await loras.base_of(asked, card)
            if parent is None:
                raise NotFound(f"The model '{asked[:200]}' does not exist.", param="model", code="model_not_found")
        return json_answer(replace(model_of(card, started_at), id=asked, parent=parent))

    async def model_info(request: Request) -> Response:
        return json_answer(info_of(loaded_card(engine)))

    async def model_path_only(request: Request) -> Response:
        return json_answer({"model_path": model_path})

    async def server_info(request: Request) -> Response:
        card = engine.card
        return json_answer(
            ServerInfo(
                version=__version__,
                model_path=model_path,
                served_model_name=None if card is None else card.name,
                state=engine.status.state,
                num_jobs=num_jobs(),
                num_gpus=0 if card is None else card.num_gpus,
                dp_size=1 if card is None else card.num_replicas,
            )
        )

    async def version(request: Request) -> Response:
        return json_answer({"version": __version__})

    return [
        Route("/models", facts),
        Route("/v1/models", listing),
        Route("/v1/models/{model:path}", one),
        Route("/models/{model:path}", one),
        Route("/model_info", model_info),
        Route("/v1/model_info", model_path_only),
        Route("/server_info", server_info),
        Route("/v1/server_info", server_info),
        Route("/version", version),
        Route("/v1/version", version),
    ]


def facts_of(card: ModelCard) -> ModelFacts:
    return ModelFacts(
        model_path=card.model_path,
        task_type=card.tasks[0],
        supported_task_types=card.tasks,
        pipeline_name=card.pipeline_name,
        pipeline_class=card.pipeline_class,
        num_gpus=card.num_gpus,
        dit_precision=_precision(card, _DENOISERS),
        vae_precision=_precision(card, _VAES),
        supports_lora=bool(card.lora_modules),
    )


def model_of(card: ModelCard, created: int) -> Model:
    facts = facts_of(card)
    return Model(
        id=card.name,
        created=created,
        root=card.name,
        media=card.media,
        default_size=f"{card.default_width}x{card.default_height}",
        default_steps=card.default_steps,
        default_guidance_scale=card.default_guidance,
        takes_negative_prompt=card.takes_negative_prompt,
        takes_guidance_scale=card.takes_guidance,
        quality_modes={mode: describe_mode(mode) for mode in RECIPES},
        parameters=dict(card.parameters),
        tuning=list(card.tuning),
        **asdict(facts),
    )


def info_of(card: ModelCard) -> ModelInfo:
    return ModelInfo(
        model_path=card.model_path,
        architectures=[card.pipeline_class],
        has_image_understanding=card.max_input_images > 0,
        task_type=card.tasks[0],
        supported_task_types=card.tasks,
        output_types=[card.media.upper()],
        is_image_gen=card.media == "image",
    )


def _precision(card: ModelCard, components: tuple[str, ...]) -> str | None:
    return next((card.precisions[name] for name in components if name in card.precisions), None)
