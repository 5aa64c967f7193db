"""The web page: the only file that imports gradio. What its form means is in form.py, the drawing in live.py."""

import asyncio
import html
import json
import secrets
import shutil
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.drawing.pictures import Request, Sampler, Settings, read_origin, save_picture
from trainer.web.camera_outline import MOVE_OUTLINE, outline_html
from trainer.web.form import FORM, Limits, example_rows, form_of, read_form, size_presets
from trainer.web.live import Draw, Drawn, ModelFacts, Step
from trainer.web.page_metrics import FORMAT, PageFigures
from trainer.web.passwords import Attempts, CheckLogin
from trainer.web.turns import QueueFull, Turns

_TITLE: Final = "homemade-diffusion"
_HISTORY: Final = 48  # pictures of a session that are kept; older ones are removed
# Of all sessions together: gradio says nothing when it forgets one, and a script need not end its own.
_MOST_STORED: Final = 2000
_MOST_EXAMPLES: Final = 6
_LARGEST_SEED: Final = 2**31  # of the random ones: short enough to be read aloud

_STYLE: Final = """
.gradio-container { max-width: 1100px !important; margin: auto !important }
.gradio-container main { padding: 12px !important }
#picture img, #history img { image-rendering: pixelated; object-fit: contain; width: 100%; height: 100% }
#camera, #camera .styler, #camera .column { background: var(--block-background-fill) }
#history .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important }
#outline { max-width: 200px; margin: auto; padding: 6px; text-align: center; font-size: 0.8em }
#outline svg { width: 100%; aspect-ratio: 1; overflow: hidden }
#outline rect, #outline path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.5px }
#outline .frame { stroke: currentColor; stroke-dasharray: 5 4; opacity: 0.6 }
#outline .view { stroke: #ea580c; fill: #ea580c22; stroke-width: 2.5px }
#outline .view-key { color: #ea580c }
#outline p { margin: 2px }
#outline.impossible svg { opacity: 0.15 }
#message { min-height: 2.2em }
#message p { margin: 0.2em 0 }
#message progress { width: 100% }
#message .refused { border-left: 4px solid #dc2626; padding-left: 0.6em; font-weight: 600 }
"""


@dataclass(frozen=True)
class Studio:
    """What one page works with."""

    facts: ModelFacts
    limits: Limits
    draw: Draw
    turns: Turns
    figures: PageFigures
    folder: Path  # of the pictures, while the server runs
    stored: deque[Path] = field(default_factory=deque)  # pictures that were drawn last


def page_app(studio: Studio, login: CheckLogin | None) -> ASGIApp:
    """The page at /, its figures at /metrics."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(studio.figures.text(), media_type=FORMAT)

    gr.set_static_paths([studio.folder])  # served as they are: no copies, the same bytes
    gr.mount_gradio_app(
        app,
        _blocks(studio),
        path="/",
        auth=login,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size=1,  # nothing is uploaded here
        ssr_mode=False,
        # Names of fonts that are on the reader's machine.
        theme=gr.themes.Base(
            primary_hue="orange",
            font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
            font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
        ),
        css=_STYLE,
    )
    return _Closed(app)


# --- What the page shows ----------------------------------------------------------------------------------------------


def _blocks(studio: Studio) -> gr.Blocks:
    facts, limits = studio.facts, studio.limits
    start = Settings(width=facts.resolution, height=facts.resolution)
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## {_TITLE}\n{html.escape(facts.about)}")
        history = gr.State([], delete_callback=_forget)
        with gr.Row():
            with gr.Column(scale=5):
                form, preset, draw, stop = _form(facts, limits, start)
            with gr.Column(scale=4):
                picture = gr.Image(
                    label="Picture", type="filepath", interactive=False, elem_id="picture", height=380, buttons=[]
                )
                message = gr.HTML("", elem_id="message", padding=False)
                download = gr.DownloadButton("Download the PNG", interactive=False, elem_id="download")
                gr.Markdown("This session; a click brings settings back")
                gallery = gr.Gallery(
                    show_label=False,
                    elem_id="history", columns=4, height=250, allow_preview=False, interactive=False, buttons=[],
                )  # fmt: skip
        _examples(facts, form)

        async def on_draw(kept: list[tuple[str, str]], *values: Any) -> AsyncIterator[dict[Any, Any]]:
            values_by_name = dict(zip(FORM, values, strict=True))
            async with aclosing(drawing(studio, values_by_name)) as news:  # type: ignore[type-var]
                async for shown in news:
                    if isinstance(shown, str):
                        yield {message: shown}
                        continue
                    kept = _kept([(str(shown.path), values_by_name["prompt"] or "(no prompt)"), *kept])
                    yield {
                        message: shown.message,
                        picture: str(shown.path),
                        download: gr.DownloadButton(value=str(shown.path), interactive=True),
                        history: kept,
                        gallery: kept,
                    }

        def on_select(kept: list[tuple[str, str]], event: gr.SelectData) -> list[Any]:
            index = event.index
            # Of a page from before the server's start, or of a session that was away for long.
            if not isinstance(index, int) or not 0 <= index < len(kept) or not Path(kept[index][0]).exists():
                return [gr.skip()] * (len(FORM) + 4)
            path, _ = kept[index]
            again = form_of(read_origin(Path(path)))
            shown = gr.DownloadButton(value=path, interactive=True)
            return [*again.values(), None, path, shown, _note("the settings of this picture are in the form again")]

        fields = [form[name] for name in FORM]
        job = gr.on(
            [draw.click, form["prompt"].submit, form["negative"].submit],
            on_draw,
            inputs=[history, *fields],
            outputs=[message, picture, download, history, gallery],
            # Values as they were sent: read_form refuses in words what components would answer with an exception.
            preprocess=False,
            concurrency_limit=None,  # `Turns` has the queue, with a bound, and words for those beyond it
            show_progress="hidden",
            api_name="draw",
        )
        stop.click(lambda: _note("stopped"), outputs=message, cancels=[job], api_visibility="private")
        gallery.select(
            on_select, inputs=history, outputs=[*fields, preset, picture, download, message], api_visibility="private"
        )
    page.queue(max_size=None, api_open=False)
    return page


def _form(facts: ModelFacts, limits: Limits, start: Settings) -> tuple[dict[str, Any], Any, gr.Button, gr.Button]:
    """The fields by their names in FORM, the list of sizes, and the buttons."""
    form: dict[str, Any] = {
        "prompt": gr.Textbox(label="Prompt", lines=2, elem_id="prompt", placeholder="empty: whatever comes to mind"),
        "negative": gr.Textbox(label="Negative prompt", lines=1, elem_id="negative"),
    }
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        stop = gr.Button("Stop", elem_id="stop")
    with gr.Group(elem_id="camera"), gr.Row(equal_height=True):
        with gr.Column(scale=3, min_width=190):
            form["x_shift"] = gr.Slider(-1, 1, value=0, step=0.01, label="x shift →", elem_id="x_shift")
            form["y_shift"] = gr.Slider(-1, 1, value=0, step=0.01, label="y shift ↓", elem_id="y_shift")
            form["zoom"] = gr.Slider(0.1, 4, value=1, step=0.01, label="Zoom", elem_id="zoom")
        with gr.Column(scale=2, min_width=150):
            gr.HTML(outline_html(start.width, start.height), padding=False)
    presets = size_presets(facts.resolution, facts.token, limits.largest_side)
    with gr.Row():
        preset = gr.Dropdown(
            [(label, f"{width}x{height}") for label, (width, height) in presets.items()],
            value=f"{start.width}x{start.height}", label="Size", elem_id="preset", scale=2, min_width=150,
        )  # fmt: skip
        form["width"] = gr.Number(start.width, label="Width", elem_id="width", min_width=80)
        form["height"] = gr.Number(start.height, label="Height", elem_id="height", min_width=80)
    with gr.Row():
        form["sampler"] = gr.Dropdown(
            list(get_args(Sampler)), value=start.sampler, label="Sampler", elem_id="sampler", min_width=130
        )
        form["steps"] = gr.Number(min(start.steps, limits.most_steps), label="Steps", elem_id="steps", min_width=80)
        form["guidance"] = gr.Number(start.guidance, label="Guidance", elem_id="guidance", min_width=80)
    with gr.Row(equal_height=True):
        form["seed"] = gr.Number(0, label="Seed", elem_id="seed", min_width=130)
        dice = gr.Button("Random seed", elem_id="random-seed", min_width=130)
    # These run in the browser alone.
    sides = [form["width"], form["height"]]
    preset.input(None, preset, sides, js='(size) => size.split("x").map(Number)')
    gr.on([side.input for side in sides], None, None, preset, js="() => null")
    dice.click(None, None, form["seed"], js=f"() => Math.floor(Math.random() * {_LARGEST_SEED})")
    camera = [form[name] for name in ("width", "height", "x_shift", "y_shift", "zoom")]
    gr.on([field.change for field in camera], None, camera, None, js=MOVE_OUTLINE)
    return form, preset, draw, stop


def _examples(facts: ModelFacts, form: dict[str, Any]) -> None:
    """A click fills in the prompt and the camera, in the browser alone."""
    rows = [list(row) for row in example_rows(facts.prompts[:_MOST_EXAMPLES])]
    if not rows:
        return
    into = [form[name] for name in ("prompt", "x_shift", "y_shift", "zoom")]
    examples = gr.Dataset(
        label="Examples", components=into, samples=rows, headers=["prompt", "x shift", "y shift", "zoom"],
        type="index", elem_id="examples",
    )  # fmt: skip
    examples.click(None, examples, into, js=f"(number) => ({json.dumps(rows)})[number]")


# --- What happens when a picture is asked for -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    path: Path
    message: str


async def drawing(studio: Studio, values: dict[str, Any]) -> AsyncIterator[str | _Done]:
    """What to show while a picture waits and is drawn; the last is the picture, or words for why there is none."""
    figures, turns = studio.figures, studio.turns
    try:
        request = read_form(values, studio.limits)
        ticket = turns.take()
    except (ValueError, QueueFull) as refusal:
        figures.refused("queue_full" if isinstance(refusal, QueueFull) else "input")
        yield _refusal(refusal)
        return
    try:
        async for ahead in turns.until(ticket):
            yield _note(f"{ahead} before yours")
        started = time.monotonic()
        yield _progress(Step(0, request.settings.steps))
        async with aclosing(studio.draw(request)) as news:  # type: ignore[type-var]
            async for what in news:
                if isinstance(what, Step):
                    yield _progress(what)
                else:
                    path = await asyncio.to_thread(_saved, studio.folder, what)  # seconds for a large one
                    studio.stored.append(path)
                    if len(studio.stored) > _MOST_STORED:
                        _remove(studio.stored.popleft())
                    seconds = time.monotonic() - started
                    figures.drawn(seconds)
                    yield _Done(path, _note(_what_was_drawn(request, what, seconds)))
    except ValueError as refusal:  # of what only the model knows
        figures.refused("input")
        yield _refusal(refusal)
    except Exception as error:
        traceback.print_exc()
        figures.failed()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield _refusal(f"the drawing failed ({reason}); the server's own output says more. Press Draw to try again")
    finally:
        turns.leave(ticket)


def _saved(folder: Path, drawn: Drawn) -> Path:
    """As sample.py writes it, under an address that nobody guesses."""
    request = drawn.request
    out = folder / secrets.token_urlsafe(16)
    return save_picture(out, drawn.pixels, request.prompt, request.seed, request.settings, drawn.made_with)


def _what_was_drawn(wanted: Request, drawn: Drawn, seconds: float) -> str:
    asked, taken = wanted.settings, drawn.request.settings
    text = f"{taken.width} × {taken.height} pixels, {taken.steps} steps, seed {wanted.seed}, in {seconds:.1f} s"
    if (asked.width, asked.height) == (taken.width, taken.height):
        return text
    return f"{text}; {asked.width} × {asked.height} was rounded: sides are whole tokens"


def _kept(pictures: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Path and prompt of those that a session still shows, the newest first."""
    _forget(pictures[_HISTORY:])
    return [picture for picture in pictures[:_HISTORY] if Path(picture[0]).exists()]


def _forget(pictures: Iterable[tuple[str, str]]) -> None:
    for path, _ in pictures:
        _remove(Path(path))


def _remove(picture: Path) -> None:
    """With its folder; it may be gone."""
    shutil.rmtree(picture.parent, ignore_errors=True)


def _note(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def _refusal(why: object) -> str:
    return f'<p role="alert" class="refused">{html.escape(str(why))}</p>'


def _progress(step: Step) -> str:
    bar = f'<progress value="{step.done}" max="{step.of}"></progress>'
    return f'<p role="status">step {step.done} of {step.of}</p>{bar}'


# --- What the server answers ------------------------------------------------------------------------------------------

# gradio has more addresses: uploads, requests to other servers in the visitor's name, an editor of its own source.
_OPEN: Final = (
    "app_id", "call/", "cancel", "file=/", "heartbeat/", "info", "login_check", "queue/", "reset", "startup-events",
    "theme.css", "token", "user",
)  # fmt: skip
_API: Final = "/gradio_api/"
_LARGEST_BODY: Final = 2**20  # bytes: of a form that is 2 texts and numbers; read before anybody asks for a password
_SHUT: Final = ("/monitoring", "/svelte", "/pwa_icon", f"{_API}deep_link")
# The browser itself refuses whatever the page might load from elsewhere. gradio's page has scripts inline and makes
# functions of those that it is given (the outline's).
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class _Closed:
    """Around the app: only what the page needs is read and answered, logins are counted, and a policy keeps the page to
    this server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._logins = Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path.startswith(_SHUT) or (path.startswith(_API) and not path.removeprefix(_API).startswith(_OPEN)):
            await Response("not here\n", status_code=404, media_type="text/plain")(scope, receive, send)
            return

        address = (scope.get("client") or [""])[0]  # behind a proxy that does not tell, all visitors share one
        if path.startswith("/login") and scope["method"] == "POST" and not self._logins.may(address):
            await Response("too many logins; try again in a minute\n", 429)(scope, receive, send)
            return

        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > _LARGEST_BODY:
                raise HTTPException(413, f"{_LARGEST_BODY} bytes at most")  # becomes the answer, as any route's
            return message

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": [*headers, (b"referrer-policy", b"no-referrer")]}
            await send(message)

        await self._app(scope, receive_bounded, send_with_policy)
