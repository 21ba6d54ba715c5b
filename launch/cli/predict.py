"""`flowmask predict`: videos, sentences and settings from the command line to masks."""

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flowmask.launch.cli import words
from flowmask.launch.cli.track import offer
from flowmask.launch.console import err
from flowmask.launch.console import out as console
from flowmask.launch.next_steps import NEXT, say_next
from flowmask.launch.progress import told
from flowmask.models.errors import ConfigError, UserError

if TYPE_CHECKING:
    from flowmask.data_pipeline.config import FrameBox


Given = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="VIDEO PROMPTS", help="A video file or a folder of frames (or use --video), then sentences in quotes"
    ),
]
Videos = Annotated[list[Path] | None, typer.Option(help="A video; may be repeated. Results are in OUT/<video name>")]
PromptFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="UTF-8 file with more sentences, one on each line; - is stdin")
]
Fps = Annotated[
    float | None,
    typer.Option(
        help="Sample frames at this rate; a video with a lower rate keeps all frames. "
        "A folder of frames keeps all, and its overlay plays at this rate; default: 10"
    ),
]
Shift = Annotated[float, typer.Option(help="Time shift of the sampler, above 0; 1: even steps")]
Height = Annotated[
    int | None,
    typer.Option(
        help="With --width: the box in px into which frames are resized; default: the size of the training", min=16
    ),
]
Threshold = Annotated[float, typer.Option(help="Probability above which a pixel is in the mask, 0 to 1")]


def _refuse_clip_frames(given: int | None) -> None:
    if given is not None:
        raise ConfigError("--clip-frames was removed; use --window-frames 4k+1, whose windows overlap and are blended")


def predict(
    given: Given = None,
    *,
    checkpoint: Annotated[str, typer.Option(help="A run, an export, or a FlowRVS .pth")],
    video: Videos = None,
    prompts: PromptFile = None,
    out: Annotated[Path, typer.Option(help="Folder for masks and overlay videos")] = Path("out/predict"),
    mask_decoder: words.MaskDecoderOf = None,
    wan: words.WanOf = None,
    fps: Fps = None,
    max_frames: Annotated[int | None, typer.Option(help="Largest number of frames, from the start", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Euler steps", min=1, max=1000)] = 1,
    shift: Shift = 3.0,
    height: Height = None,
    width: Annotated[int | None, typer.Option(help="With --height", min=16)] = None,
    threshold: Threshold = 0.5,
    window_frames: words.WindowFrames = None,
    window_overlap: words.WindowOverlap = 16,
    clip_frames: Annotated[int | None, typer.Option(hidden=True, callback=_refuse_clip_frames)] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Also write a PNG of some frames per sentence")] = False,
    allow_truncated: words.AllowTruncated = False,
    averaged: words.Averaged = True,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one")] = "auto",
    precision: words.PrecisionOf = "bf16",
    attention: words.AttentionOf = "native",
    encoder_precision: words.EncoderPrecisionOf = None,
    presence: words.PresenceOf = None,
    pixel_norm: words.PixelNormOf = None,
    text_tokens: words.TextTokensOf = None,
    mask_latent_norm: words.MaskLatentNormOf = None,
    lowercase: words.LowercaseOf = None,
) -> None:
    """Segment the object that each sentence names in videos: PNG masks, run-length masks and overlay videos."""
    if not 0 < shift < math.inf:
        raise ConfigError(f"--shift is {shift:g}; it must be above 0; the default is 3")
    videos, sentences = _asked(given or [], video or [], prompts)
    _require_files(videos, checkpoint)
    with told() as on_progress:
        on_progress("starting", 0, 1)  # the import of torch takes seconds
        words.load_wan_libraries(say=False)
        from flowmask.models.config import SamplerConfig
        from flowmask.trainer.predict import predict as predicting
        from flowmask.trainer.predict.predictions import result_folders
        from flowmask.trainer.predict.windows.cut import WindowConfig

        on_progress("starting", 1, 1)
        made = predicting.predict_videos(
            result_folders(out, videos),
            sentences,
            checkpoint=checkpoint,
            mask_decoder=mask_decoder,
            wan=wan,
            ema=averaged,
            sampler=SamplerConfig(steps=steps, shift=shift),
            box=_box(height, width),
            precision=precision,
            attention=attention,
            encoder_precision=encoder_precision,
            device=device,
            fps=fps,
            max_frames=max_frames,
            window=WindowConfig(frames=window_frames, overlap=window_overlap),
            allow_truncated=allow_truncated,
            presence=presence,
            threshold=threshold,
            figures=figures,
            conventions=words.conventions_of(pixel_norm, text_tokens, mask_latent_norm, lowercase),
            on_progress=on_progress,
            say=err.print,
        )
    for result in made:
        place = result.overlay.parent
        console.print(
            f"overlay  {result.overlay}\nmasks    {place}/<sentence>/<frame>.png, {place}/<sentence>.rle.json"
        )
        if figures:
            console.print(f"figures  {place}/<sentence>.png")
        offer(checkpoint, result.overlay, to="predict")
    say_next(NEXT["predict"], checkpoint)


def read_prompts(name: str) -> list[str]:
    """The sentences of a file, one on each line; "-" is stdin. Empty lines and surrounding spaces are dropped."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = re.split(r"\r\n|\r|\n", content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"--prompts {name} can't be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        raise UserError(f"--prompts {name}: line {line} is not UTF-8; save the file as UTF-8") from None
    if not (sentences := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--prompts {name} holds no sentence; write one on each line")
    return sentences


def _require_files(videos: list[Path], checkpoint: str) -> None:
    """Raises UserError for a missing file before the libraries are loaded, which takes seconds."""
    for video in videos:
        if not video.exists():
            raise UserError(f"{video}: no such video file or folder of frames")
    if not Path(checkpoint).exists():
        raise UserError(f"--checkpoint {checkpoint} does not exist; give a run, an export, or a FlowRVS .pth file")


def _asked(given: list[str], videos: list[Path], prompts: str | None) -> tuple[list[Path], list[str]]:
    """The videos and the sentences, without duplicate sentences."""
    if not videos and not given:
        raise UserError('no video was given; for example: flowmask predict clip.mp4 "the red car" --checkpoint RUN')
    typed = given if videos else given[1:]
    for word in typed:
        if Path(word).suffix and Path(word).is_file():
            raise UserError(f"{word} is a file, but a sentence is expected here; for several videos use --video {word}")
    sentences = [*typed, *(read_prompts(prompts) if prompts is not None else [])]
    return videos or [Path(given[0])], list(dict.fromkeys(sentences))


def _box(height: int | None, width: int | None) -> "FrameBox | None":
    from flowmask.data_pipeline.config import FrameBox

    if height is None and width is None:
        return None
    if height is None or width is None:
        raise UserError("--height and --width must be given together: each frame is resized to fit into that box")
    return FrameBox(height_px=height, width_px=width)
