"""The HTTP application: the table of every endpoint, and what stands between them and the world."""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from ..core.config import ServeConfig
from ..core.errors import ServiceError
from ..engine import Engine
from ..jobs.store import JobStore
from ..media.pool import MediaPool
from ..storage import Storage
from .auth import OPEN_PATHS, Keys
from .border import Border
from .clip_sources import ClipSources
from .inputs import Intake
from .loras import Loras
from .metrics import Metrics
from .openapi import describe_api
from .problems import on_error
from .resolve import Resolver
from .routes.files import file_routes
from .routes.images import image_routes
from .routes.loras import lora_routes
from .routes.metrics import METRICS_PATH, metrics_routes
from .routes.models import model_routes
from .routes.page import page_routes
from .routes.probes import probe_routes
from .routes.videos import video_routes
from .service import Service
from .tallies import RequestTally
from .uploads import Uploads


def create_app(
    config: ServeConfig,
    engine: Engine,
    service: Service,
    loras: Loras,
    store: JobStore,
    storage: Storage,
    keys: Keys,
    intake: Intake,
    uploads: Uploads,
    media: MediaPool,
    clip_sources: ClipSources,
) -> Starlette:
    """Return the application over what it needs; building it starts nothing."""
    resolver = Resolver(config=config)
    tally = RequestTally()
    # Looked through in this order: those that are asked for most come first.
    routes = [
        *image_routes(config, service, loras, store, storage, resolver, intake),
        *video_routes(config, service, loras, store, storage, media, resolver, clip_sources),
        *page_routes(config, describe_api),
        *probe_routes(engine, lambda: service.is_draining),
        *metrics_routes(config, Metrics(engine, service, tally), keys),
        *model_routes(engine, loras, config.model_path, int(time.time()), lambda: service.num_jobs),
        *file_routes(config, uploads),
        *lora_routes(service, loras, keys),
    ]
    open_paths = OPEN_PATHS | {METRICS_PATH} if config.open_metrics else OPEN_PATHS
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Border, keys=keys, open_paths=open_paths, tally=tally)],
        exception_handlers={HTTPException: on_error, ServiceError: on_error},
    )
    app.router.redirect_slashes = False
    return app
