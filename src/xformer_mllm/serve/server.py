"""`xformer serve`: load the models, and listen."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

from xformer_mllm import defaults
from xformer_mllm.checkpoints import load_model, model_name
from xformer_mllm.commands import ServeConfig
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.serve.api import ApiSettings, create_app
from xformer_mllm.serve.engine import Engine, Loaded
from xformer_mllm.serve.images import ImageLimits

BACKLOG = 1024
STOP_SECONDS = 15
"""How long answers may take after SIGTERM or Ctrl-C."""
DEFAULT_TOKENS = 32


def serve(config: ServeConfig) -> None:
    """Run `xformer serve` until SIGTERM or Ctrl-C.

    Raises FileNotFoundError or ValueError for a folder without such a model, OSError if the port is taken.
    """
    listening, examples = listen(config.host, config.port), examples_of(config)
    models = load(config)
    engine = Engine(models, max_batch=config.max_batch, max_waiting=config.max_waiting)
    app = create_app(engine, settings_of(config, models))
    host, port = listening.getsockname()[:2]
    address = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    if config.page:
        from xformer_mllm.serve.page import mount_page

        app = mount_page(app, engine, app.state.settings, examples)
        print(f"page: {address}")
    print(f"API:  {address}/v1 (models: {', '.join(app.state.settings.names)})")
    if app.state.settings.api_key is None and not _is_local(host):
        print("other machines can reach this server, and no --api-key is set", file=sys.stderr)
    settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS)
    uvicorn.Server(settings).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Open the socket first: a taken port is found before the models are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another --port"
        ) from None
    # Connections inherit it; asyncio sets it only on its own sockets. Without it, answers wait 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def load(config: ServeConfig) -> dict[str, Loaded]:
    """Name -> model: the one to serve, the baseline, and the one of stage 1.

    Raises FileNotFoundError or ValueError for a folder without such a model, or for two of one name.
    """
    shipped = config.model is None
    folders = [
        (config.model or defaults.shipped_model("xformer"), XFormerForConditionalGeneration),
        (config.baseline or (defaults.shipped_model("qformer") if shipped else None), XFormerForConditionalGeneration),
        (config.stage1 or (defaults.shipped_model("xformer-stage1") if shipped else None), XFormerForPreTraining),
    ]
    models: dict[str, Loaded] = {}
    for folder, kind in folders:
        if folder is None:
            continue
        # The page shows the queries' attention maps, which only this implementation returns.
        attention: Any = {"": "eager", "qformer_config": "eager"} if config.page else None
        name = model_name(folder)
        if name in models:
            raise ValueError(f"{folder}: a model named {name!r} is served already; rename the folder")
        models[name] = Loaded(*load_model(folder, [kind], attention))
    return models


def settings_of(config: ServeConfig, models: dict[str, Loaded]) -> ApiSettings:
    """What the API serves and accepts."""
    stage1 = [name for name, loaded in models.items() if isinstance(loaded.model, XFormerForPreTraining)]
    return ApiSettings(
        answering=tuple(name for name in models if name not in stage1),
        embedding=next(iter(stage1), None),
        images=ImageLimits(config.max_pixels, config.max_body, config.allow_url_host),
        max_tokens=config.max_tokens,
        default_tokens=min(DEFAULT_TOKENS, config.max_tokens),
        max_body=config.max_body,
        seconds=config.seconds,
        api_key=config.api_key or os.environ.get("XFORMER_API_KEY") or None,
    )


def examples_of(config: ServeConfig) -> list[Path]:
    """The page's example images. Raises ValueError for a folder without any."""
    if config.examples is None:
        return defaults.example_images() if config.model is None else []
    found = sorted(
        path for path in config.examples.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    )
    if not found:
        raise ValueError(f"--examples {config.examples}: no images found; expected files such as .jpg or .png")
    return found


def _is_local(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
