"""The page's gradio components and what connects them."""

import html
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, get_args

import gradio as gr

from trainer.drawing.picture_files import read_metadata
from trainer.drawing.settings import Sampler, SamplingSettings
from trainer.web.camera_outline import MOVE_OUTLINE, outline_html
from trainer.web.form import FORM, RequestLimits, example_rows, form_of, size_presets
from trainer.web.picture_events import PageContext, picture_events, remove_picture, status
from trainer.web.stream import ModelInfo

_TITLE: Final = "homemade-diffusion"
_HISTORY: Final = 48  # pictures of a session that are kept
_MOST_EXAMPLES: Final = 6
_LARGEST_RANDOM_SEED: Final = 2**31  # short enough to be read aloud
STYLE: Final = Path(__file__).with_name("page.css").read_text()
# Only fonts of the reader's machine.
THEME: Final = gr.themes.Base(
    primary_hue="orange",
    font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
    font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
)


def build_page(context: PageContext) -> gr.Blocks:
    info, limits = context.info, context.limits
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## {_TITLE}\n{html.escape(info.description)}")
        history = gr.State([], delete_callback=_remove_all)
        with gr.Row():
            with gr.Column(scale=5):
                form, preset, draw, stop = _form(info, limits)
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
        _examples(info, form)

        async def on_draw(kept: list[tuple[str, str]], *values: Any) -> AsyncIterator[dict[Any, Any]]:
            values_by_name = dict(zip(FORM, values, strict=True))
            async with aclosing(picture_events(context, values_by_name)) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, str):
                        yield {message: event}
                        continue
                    kept = _kept([(str(event.path), values_by_name["prompt"] or "(no prompt)"), *kept])
                    yield {
                        message: event.message,
                        picture: str(event.path),
                        download: gr.DownloadButton(value=str(event.path), interactive=True),
                        history: kept,
                        gallery: kept,
                    }

        def on_select(kept: list[tuple[str, str]], event: gr.SelectData) -> list[Any]:
            index = event.index
            # A page opened before the server started, or a session whose pictures were removed.
            if not isinstance(index, int) or not 0 <= index < len(kept) or not Path(kept[index][0]).exists():
                return [gr.skip()] * (len(FORM) + 4)
            path, _ = kept[index]
            again = form_of(read_metadata(Path(path)))
            shown = gr.DownloadButton(value=path, interactive=True)
            return [*again.values(), None, path, shown, status("the settings of this picture are in the form again")]

        fields = [form[name] for name in FORM]
        job = gr.on(
            [draw.click, form["prompt"].submit, form["negative"].submit],
            on_draw,
            inputs=[history, *fields],
            outputs=[message, picture, download, history, gallery],
            # Raw values: read_form refuses with a message what the components would answer with an exception.
            preprocess=False,
            concurrency_limit=None,  # DrawingQueue limits it
            show_progress="hidden",
            api_name="draw",
        )
        stop.click(lambda: status("stopped"), outputs=message, cancels=[job], api_visibility="private")
        gallery.select(
            on_select, inputs=history, outputs=[*fields, preset, picture, download, message], api_visibility="private"
        )
    page.queue(max_size=None, api_open=False)
    return page


def _form(info: ModelInfo, limits: RequestLimits) -> tuple[dict[str, Any], Any, gr.Button, gr.Button]:
    """The fields by their names in FORM, the list of sizes, and the buttons."""
    start = SamplingSettings(width=info.resolution, height=info.resolution)
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
    presets = size_presets(info.resolution, info.token, limits.largest_side)
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
    # These run only in the browser.
    sides = [form["width"], form["height"]]
    preset.input(None, preset, sides, js='(size) => size.split("x").map(Number)')
    gr.on([side.input for side in sides], None, None, preset, js="() => null")
    dice.click(None, None, form["seed"], js=f"() => Math.floor(Math.random() * {_LARGEST_RANDOM_SEED})")
    camera = [form[name] for name in ("width", "height", "x_shift", "y_shift", "zoom")]
    gr.on([field.change for field in camera], None, camera, None, js=MOVE_OUTLINE)
    return form, preset, draw, stop


def _examples(info: ModelInfo, form: dict[str, Any]) -> None:
    """A click fills in the prompt and the camera, only in the browser."""
    rows = [list(row) for row in example_rows(info.prompts[:_MOST_EXAMPLES])]
    if not rows:
        return
    into = [form[name] for name in ("prompt", "x_shift", "y_shift", "zoom")]
    examples = gr.Dataset(
        label="Examples", components=into, samples=rows, headers=["prompt", "x shift", "y shift", "zoom"],
        type="index", elem_id="examples",
    )  # fmt: skip
    examples.click(None, examples, into, js=f"(number) => ({json.dumps(rows)})[number]")


def _kept(pictures: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Path and prompt of the pictures that a session still shows, the newest first."""
    _remove_all(pictures[_HISTORY:])
    return [picture for picture in pictures[:_HISTORY] if Path(picture[0]).exists()]


def _remove_all(pictures: Iterable[tuple[str, str]]) -> None:
    for path, _ in pictures:
        remove_picture(Path(path))
