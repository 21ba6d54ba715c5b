"""`flowmask serve`: its options and its output."""

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowmask.launch.cli import words
from flowmask.launch.console import err
from flowmask.launch.console import out as console

if TYPE_CHECKING:
    from flowmask.trainer.predict.predict import Predictions


def serve(
    run: Annotated[str, typer.Argument(help="A run, an export, or a FlowRVS .pth")],
    mask_decoder: words.MaskDecoderOf = None,
    wan: words.WanOf = None,
    steps: Annotated[int, typer.Option(help="Euler steps", min=1, max=1000)] = 1,
    shift: Annotated[float, typer.Option(help="Time shift of the sampler; 1: even steps", min=0.01)] = 3.0,
    window_frames: words.WindowFrames = None,
    window_overlap: words.WindowOverlap = 16,
    averaged: words.Averaged = True,
    precision: words.PrecisionOf = "bf16",
    attention: words.AttentionOf = "native",
    encoder_precision: words.EncoderPrecisionOf = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it computes")] = "auto",
    presence: words.PresenceOf = None,
    pixel_norm: words.PixelNormOf = None,
    text_tokens: words.TextTokensOf = None,
    mask_latent_norm: words.MaskLatentNormOf = None,
    lowercase: words.LowercaseOf = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1: only this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one", min=0, max=65535)] = 7860,
    clips: Annotated[Path | None, typer.Option(help="Folder of videos that people may choose from")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for uploads while they are used; default: the temporary folder")
    ] = None,
    max_megabytes: Annotated[int, typer.Option(help="Largest clip in MB", min=1)] = 100,
    max_seconds: Annotated[float, typer.Option(help="Longest clip in seconds", min=0.1)] = 60.0,
    max_sentences: Annotated[int, typer.Option(help="Most sentences of a request", min=1)] = 8,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait", min=0, max=30)] = 8,
) -> None:
    """Serve a web page: people upload a clip, type sentences, and get masks and overlays. Needs 'flowmask\\[serve]'."""
    err.print(f"flowmask serve: loading {run}")
    words.load_wan_libraries(say=False)
    from flowmask.launch.serve import page, server
    from flowmask.launch.serve.limits import Limits
    from flowmask.models.config import SamplerConfig
    from flowmask.trainer.predict.windows.cut import WindowConfig

    page.require()
    limits = Limits(max_megabytes, max_seconds, max_sentences, max_waiting)
    shown = server.clips_in(clips)
    listening = server.listen(host, port)
    if warned := server.warning(host):
        err.print(warned, style="yellow")
    options: dict[str, Any] = {
        "mask_decoder": mask_decoder,
        "wan": wan,
        "ema": averaged,
        "sampler": SamplerConfig(steps=steps, shift=shift),
        "precision": precision,
        "attention": attention,
        "encoder_precision": encoder_precision,
        "device": device,
        "conventions": words.conventions_of(pixel_norm, text_tokens, mask_latent_norm, lowercase),
    }
    window = WindowConfig(frames=window_frames, overlap=window_overlap)
    parent = (out or Path(tempfile.gettempdir())).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    server.serve(
        listening,
        lambda: _loaded(run, options, window=window, presence=presence),
        title=Path(run).name,
        clips=shown,
        limits=limits,
        parent=parent,
        on_ready=lambda: console.print(server.address_of(listening)),
    )


def _loaded(run: str, options: dict[str, Any], **more: Any) -> "partial[Predictions]":
    """`predict` with weights loaded now and kept."""
    from flowmask.trainer.predict.inference import load_segmenter
    from flowmask.trainer.predict.predict import predict

    segmenter = load_segmenter(run, **options, say=err.print)
    return partial(predict, checkpoint=run, load=lambda *_, **__: segmenter, **options, **more)
