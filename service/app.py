"""The HTTP application: its paths, put together with what answers them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from service import __version__, inference_protocol
from service.bundle import Bundle
from service.classify import classify
from service.errors import RefrainError, ReloadForbidden
from service.front import Front
from service.loading import MakeEngine, Model, load_bundles, make_engine
from service.openapi import document, json_body, problems
from service.problems import on_bug, on_http_exception, on_refrain_error
from service.runtime import Runtime, runtime_of
from service.schemas import ClassifyAnswer, ModelInfo, ModelsAnswer, ReloadAnswer, Status
from service.serving import Changes
from service.settings import Settings
from service.shadow import Shadows
from service.tracing import NOTHING, start_tracing

PLAYGROUND = Path(__file__).with_name("playground.html").read_text(encoding="utf-8")
# The page holds its own script and style, and talks to nobody but this service.
PLAYGROUND_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)
# One thread: whoever asks during a reload waits for its end, and then for one more, which all of them share.
_RELOAD_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reload")

router = APIRouter()
router.add_api_route(
    "/classify",
    classify,
    methods=["POST"],
    summary="Classify one text or a list of texts",
    description="One result for each input, in order. A list is answered whole or refused whole.",
    response_model=ClassifyAnswer,
    responses=problems(400, 401, 404, 408, 413, 415, 422, 429, 431, 500, 503, 504),
    openapi_extra={"requestBody": json_body("ClassifyRequest")},
)


def create_app(
    settings: Settings,
    bundles: Sequence[Bundle] | None = None,
    make: MakeEngine = make_engine,
    on_reload: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Put the service together; bundles are read and verified here, engines load once the app has started.

    `bundles` and `make` let a test bring its own; `on_reload` is called when a reload was asked for and went well.
    Raises StartError.
    """
    tracing = start_tracing(settings)
    runtime = Runtime(settings, lambda: load_bundles(settings) if bundles is None else list(bundles), make)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runtime.start()
        yield
        await asyncio.to_thread(runtime.stop)
        if tracing is not None:
            await asyncio.to_thread(tracing.stop)

    # /docs is FastAPI's page: its script and style come from a public CDN, so the browser needs a way there.
    # /openapi.json, the playground and all else do not.
    app = FastAPI(
        title="Refrain",
        version=__version__,
        description="Text classification with a recurrent and a standard Transformer.",
        lifespan=lifespan,
        redoc_url=None,
        telemetry=NOTHING if tracing is None else tracing.config,
        redirect_slashes=False,
        exception_handlers={RefrainError: on_refrain_error, HTTPException: on_http_exception, Exception: on_bug},
    )
    app.state.runtime = runtime
    app.state.shadows = Shadows(runtime)
    app.state.on_reload = on_reload
    app.state.reload = None  # the last that was asked for
    app.state.exposition = None  # of the metrics, the last that was begun
    app.include_router(router)
    app.include_router(inference_protocol.router)
    # The front goes outside of the framework's own layers, and takes /classify past them: a fifth of its CPU time.
    app.middleware_stack = Front(
        app.build_middleware_stack(),
        direct={("POST", "/classify"): classify},
        metrics=runtime.metrics,
        api_keys=settings.api_keys,
        traced=tracing is not None,
    )
    app.openapi = lambda: document(app, runtime)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


@router.head("/", include_in_schema=False)
@router.get("/", response_class=HTMLResponse, summary="Playground", responses=problems(401))
async def playground() -> HTMLResponse:
    """Answer with a page to try the models by hand."""
    return HTMLResponse(PLAYGROUND, headers={"content-security-policy": PLAYGROUND_POLICY})


@router.get("/models", summary="What is loaded", responses=problems(401, 503))
async def models(request: Request) -> ModelsAnswer:
    """Answer with the loaded bundles, their quality, and who answers by default."""
    runtime = runtime_of(request)
    runtime.check_open()
    return ModelsAnswer(
        default_task=runtime.serving.default_task,
        routing=runtime.serving.routing,
        models=[_describe(model) for _, model in sorted(runtime.serving.models.items())],
    )


@router.post("/reload", summary="Load the bundles again", responses=problems(401, 403, 409, 503))
async def reload(request: Request) -> ReloadAnswer:
    """Answer once what the models directory holds now is served here; the other processes follow.

    The models that it replaces finish what they have begun. When anything is wrong with it, nothing changes.
    """
    runtime, state = runtime_of(request), request.app.state
    if not runtime.settings.api_keys:
        raise ReloadForbidden

    def work() -> Changes:
        changed = runtime.reload()
        state.on_reload()
        return changed

    if state.reload is None or state.reload.running() or state.reload.done():
        state.reload = _RELOAD_THREAD.submit(work)
    return ReloadAnswer(**asdict(await asyncio.shield(asyncio.wrap_future(state.reload))))


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Alive", responses=problems(503))
async def healthz(request: Request) -> Status:
    """Answer 200 while every engine is alive."""
    runtime_of(request).check_alive()
    return Status(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Ready", responses=problems(503))
async def readyz(request: Request) -> Status:
    """Answer 200 while requests are welcome: not while starting, and not from the first moment of shutdown."""
    runtime_of(request).check_ready()
    return Status(status="ready")


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Answer in Prometheus' text format; who asks while it is being written shares it: the path is open to all."""
    state = request.app.state
    if state.exposition is None or state.exposition.done():
        state.exposition = asyncio.create_task(asyncio.to_thread(runtime_of(request).metrics.exposition))
    return Response(await asyncio.shield(state.exposition), media_type=CONTENT_TYPE_LATEST)


def _describe(model: Model) -> ModelInfo:
    manifest: dict[str, Any] = model.manifest.model_dump(mode="json")
    return ModelInfo(
        **{name: manifest[name] for name in ModelInfo.model_fields.keys() & manifest.keys()},
        precision=model.engine.precision,
        provider=model.engine.provider,
        model_bytes=model.engine.model_bytes,
    )
