"""The web page itself. The only importer of Gradio.

Every answer is escaped text, or a file from the user's own folder.
"""

import html
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowmask.launch.serve.limits import MIB
from flowmask.launch.serve.service import Found, PersonLeftError, Service
from flowmask.models.errors import ConfigError, UserError
from flowmask.models.safe.words import printable

_STYLE = """
.gradio-container {width: 100% !important; max-width: 1100px !important; margin: 0 auto !important}
.said {margin: 0; padding: 2px 4px; overflow-wrap: anywhere}
.said.wrong {color: #b42318; font-weight: 600}
.dark .said.wrong {color: #fda29b}
#masks h3 {margin: 16px 0 8px; overflow-wrap: anywhere}
.masks {display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 12px}
@media (min-width: 800px) {.masks {grid-template-columns: repeat(6, 1fr)}}
#masks figure {margin: 0}
#masks img {width: 100%; border: 1px solid var(--border-color-primary); border-radius: 4px}
#masks figcaption {font-size: 13px; opacity: .8}
"""


def require() -> None:
    """Raises ConfigError if Gradio is missing."""
    try:
        import gradio  # noqa: F401 - the page is built with it
    except ImportError as error:
        raise ConfigError("flowmask serve needs Gradio: pip install 'flowmask[serve]'") from error


def application(service: Service, *, title: str) -> Any:
    """The page as an ASGI application. title: name of the weights, shown next to the name of the program."""
    import gradio as gr
    from fastapi import FastAPI

    page = _blocks(service, title=title)
    page.has_launched = True  # otherwise a mounted Gradio accepts any path in a request as an upload
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=service.limits.megabytes * MIB,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
    )


def _blocks(service: Service, *, title: str) -> Any:
    import gradio as gr

    with gr.Blocks(analytics_enabled=False, title=f"FlowMask - {title}") as page:
        gr.Markdown(
            f"# FlowMask\nSegment the object that a sentence names in a video. Limits: {service.limits.said()}."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                # not gr.Video: browsers play only few formats
                video = gr.File(label="Clip", elem_id="clip", height=140)
                clip = gr.Dropdown(
                    sorted(service.clips),
                    value=None,
                    label="Or choose a clip",
                    elem_id="clips",
                    visible=bool(service.clips),
                )
                text = gr.Textbox(label="Sentences, one a line", placeholder="the red car", lines=4, elem_id="text")
                button = gr.Button("Find", variant="primary", elem_id="find")
                status = gr.HTML(elem_id="status")
            with gr.Column(min_width=300):
                overlay = gr.Video(label="Overlay", interactive=False, elem_id="overlay", height=300, buttons=[])
                everything = gr.DownloadButton("Download masks and overlays", interactive=False, elem_id="download")
        masks = gr.HTML(elem_id="masks")
        answers = [status, overlay, masks, everything]
        wired: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        look, lend, find, leave = _handlers(service, gr)
        video.upload(look, [video], [status], **wired)
        clip.input(lend, [clip], [video, status], **wired)
        button.click(
            find, [video, text], answers, concurrency_limit=None, api_visibility="private", show_progress_on=[overlay]
        )
        page.unload(leave)
    page.queue(default_concurrency_limit=None)
    return page


def _handlers(service: Service, gr: Any) -> tuple[Callable[..., Any], ...]:
    """The handlers of the page: for an upload, a clip of the list, the button, and a user who leaves."""

    def look(video: str | None, request: gr.Request) -> Any:
        return _answer(lambda: _line(service.look(request.session_hash, Path(video or ""))), instead=[])

    def lend(name: str, request: gr.Request) -> Any:
        def work() -> list[Any]:
            copy = service.lend(request.session_hash, name)
            return [str(copy), _line(service.look(request.session_hash, copy))]

        return _answer(work, instead=[gr.skip()], status_first=False)

    def find(
        video: str | None,
        text: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio finds it by its default
    ) -> Any:
        def tell(what: str, done: int, total: int) -> None:
            progress((done, total), desc=what.capitalize(), unit="")

        def work() -> list[Any]:
            found = service.find(request.session_hash, Path(video) if video else None, text or "", tell=tell)
            return ["".join(map(_line, ["Done.", *found.notes])), *_shown(found, gr)]

        return _answer(work, instead=[gr.skip()] * 3)

    def leave(request: gr.Request) -> None:
        service.leave(request.session_hash)

    return look, lend, find, leave


def _shown(found: Found, gr: Any) -> list[Any]:
    masks = "".join(_mask_row(sentence, pictures) for sentence, pictures in found.masks.items())
    return [str(found.overlay), masks, gr.DownloadButton(value=str(found.everything), interactive=True)]


def _mask_row(sentence: str, pictures: Mapping[str, Path]) -> str:
    """A heading and some masks, each with its frame below."""
    said = html.escape(printable(sentence))
    figures = (
        f'<figure><img src="gradio_api/file={quote(str(path))}" alt="mask of {said}, {frame}">'
        f"<figcaption>{frame}</figcaption></figure>"
        for frame, path in pictures.items()
    )
    return f'<h3>{said}</h3><div class="masks">{"".join(figures)}</div>'


def _answer(work: Callable[[], Any], *, instead: list[Any], status_first: bool = True) -> Any:
    """The result of `work`; if it fails, one line with the reason, and `instead` for all other parts."""
    try:
        return work()
    except PersonLeftError:
        line = _line("Stopped.")
    except UserError as error:
        line = _line(str(error), wrong=True)
    except Exception:  # noqa: BLE001 - the page keeps serving other users
        traceback.print_exc(file=sys.stderr)
        line = _line("an error occurred on the server; see its log", wrong=True)
    if not instead:
        return line
    return [line, *instead] if status_first else [*instead, line]


def _line(said: str, *, wrong: bool = False) -> str:
    text = html.escape(printable(f"Error: {said}" if wrong else said))
    return f'<p class="said{" wrong" * wrong}" role="status">{text}</p>'
