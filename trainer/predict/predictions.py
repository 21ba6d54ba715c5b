"""A folder of predictions: its predictions.json, and how new predictions join existing ones.

A prediction replaces one of the same video and prompt; all others stay, also in predictions.json. Two predictions
that end at the same time are both kept: each is built in its own scratch folder, and joins under the folder's lock.

Each entry of `prompts` is complete by itself; the top level is the last prediction's. The overlay videos with all
prompts are overlay.mp4, overlay-2.mp4, ...: one for each video (`together`).
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.formats.names import same_file
from flowmask.models.errors import ConfigError
from flowmask.models.folders.output_folder import Kind, OutputFolder
from flowmask.models.stored.sealed import parse_json
from flowmask.models.text import clean, has_words, is_unicode

PREDICTIONS, OVERLAY = "predictions.json", "overlay"
PUBLISH_PATIENCE_S = 600.0  # another prediction holds the lock while it moves files
BESIDE = {"overlay": ".mp4", "rle": ".rle.json", "figure": ".png"}  # files of a prompt, next to its folder of masks
_SLUG = r"[a-z0-9-]+"
Entry = dict[str, Any]  # prompt, masks, overlay, together, and both kinds of facts
Facts = dict[str, Any]  # presence, absent, area_px of a prompt; video, checkpoint, weights, ..., frames of a prediction


class PredictionFolder:
    """The folder `out` for predictions of one video.

    Raises ConfigError, before anything is computed, if it can't be used.
    """

    def __init__(self, out: Path, *, video: str, prompts: Sequence[str]) -> None:
        self._folder = OutputFolder(out, _KIND)
        self.path, self._video, self._prompts = out, Path(video).resolve(), prompts
        with self._folder.held(patience_s=PUBLISH_PATIENCE_S):  # undoes the partial moves of a killed prediction
            replaced = [entry for entry in self._entries() if self._is_mine(entry) and entry["prompt"] in prompts]
            self._folder.refuse_strangers([*_names(replaced), PREDICTIONS], by_content=True)
        self.scratch = self._folder.scratch

    def earlier(self, frames: Sequence[str], *, source_frames: Sequence[int] | None = None) -> list[Entry]:
        """Predictions of this video for other prompts, each with a mask for every one of `frames`.

        source_frames: their indices in the video; None: consecutive
        """
        found = [entry for entry in self._entries() if self._is_mine(entry) and entry["prompt"] not in self._prompts]
        found = [e for e in found if _first(e.get("source_frames"), len(frames)) == _first(source_frames, len(frames))]
        return [e for e in found if all((self.path / e["masks"] / f"{name}.png").is_file() for name in frames)]

    def publish(self, place: Path, slugs: Sequence[str], answers: Sequence[Facts], facts: Facts) -> list[Entry]:
        """Move in the contents of a scratch: <slug>/, the files `BESIDE` it, overlay.mp4; returns the new entries.

        answers: facts about each prompt; facts: about all
        """
        with self._folder.held(patience_s=PUBLISH_PATIENCE_S):
            standing = self._entries()
            mine = [entry for entry in standing if self._is_mine(entry)]
            old = [entry for entry in mine if entry["prompt"] in self._prompts]
            taken = {path.name for path in self.path.iterdir()} - _names(old)
            together = mine[0]["together"] if mine else next(n for n in _overlays() if n not in taken)
            made, moves = [], {together: place / f"{OVERLAY}.mp4"}
            taken.add(together)
            for prompt, built, answer in zip(self._prompts, slugs, answers, strict=True):
                before = next((e["masks"] for e in old if e["prompt"] == prompt and e["masks"] not in moves), None)
                slug = before or free_slug(built, taken)
                beside = {key: end for key, end in BESIDE.items() if (place / f"{built}{end}").is_file()}
                moves |= {slug: place / built, **{f"{slug}{end}": place / f"{built}{end}" for end in beside.values()}}
                taken |= moves.keys()
                names = {key: f"{slug}{end}" for key, end in beside.items()}
                made.append({"prompt": prompt, "masks": slug, **names, "together": together} | answer | facts)
            entries = [*(entry for entry in standing if entry not in old), *made]
            said = {**facts, "overlay": together, "prompts": entries}
            (place / PREDICTIONS).write_text(json.dumps(said, indent=1, ensure_ascii=False))
            moves[PREDICTIONS] = place / PREDICTIONS
            self._folder.swap(place, moves, index=PREDICTIONS, gone=_names(old) - moves.keys())
            return made

    def _entries(self) -> list[Entry]:
        found = read_entries(self.path)
        if found is None:
            raise ConfigError(f"{self.path / PREDICTIONS} is damaged; remove it, or choose another out")
        return found

    def _is_mine(self, entry: Entry) -> bool:
        return Path(entry["video"]).resolve() == self._video


def read_entries(folder: Path) -> list[Entry] | None:
    """The entries of predictions.json, each complete; none if the file is missing, None if it is not FlowMask's."""
    try:
        said = parse_json((folder / PREDICTIONS).read_text())
        facts = {key: said[key] for key in ("video", "checkpoint", "weights", "height", "width", "fps", "frames")}
        found = [{**facts, "together": said["overlay"], **entry} for entry in said["prompts"]]
        return found if all(map(_is_safe, found)) else None
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_safe(entry: Entry) -> bool:
    """Whether the names of an entry have FlowMask's form."""
    slug, frames = entry["masks"], entry["frames"]
    return (
        bool(re.fullmatch(_SLUG, slug) and re.fullmatch(rf"{OVERLAY}(-\d+)?\.mp4", entry["together"]))
        and "overlay" in entry
        and isinstance(entry.get("source_frames"), list | None)
        and all(entry.get(key, f"{slug}{end}") == f"{slug}{end}" for key, end in BESIDE.items())
        and all(isinstance(entry[key], str) for key in ("prompt", "video"))
        and all(isinstance(name, str) and Path(name).name == name for name in frames)
    )


def _names(entries: Collection[Entry]) -> set[str]:
    """The folders of masks and the files that only these entries use."""
    return {entry[key] for entry in entries for key in ("masks", *BESIDE) if key in entry}


def _first(numbers: Sequence[int] | None, count: int) -> list[int]:
    return list(range(count) if numbers is None else numbers[:count])


def free_slug(stem: str, taken: Collection[str]) -> str:
    """The first of stem, stem-2, stem-3, ... that is neither a used name nor the name of another file there."""
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(n for n in names if n not in taken and all(f"{n}{end}" not in taken for end in BESIDE.values()))


def _overlays() -> Iterator[str]:
    yield f"{OVERLAY}.mp4"
    yield from (f"{OVERLAY}-{number}.mp4" for number in count(2))


def _older(folder: Path) -> list[str] | None:
    """The files of predictions of an earlier version, which replaced one another."""
    entries = read_entries(folder)
    if not entries:
        return None
    masks = [f"{entry['masks']}/{name}.png" for entry in entries for name in entry["frames"]]
    return [PREDICTIONS, *masks, *{name for entry in entries for name in (entry["overlay"], entry["together"])}]


_KIND = Kind("a folder of predictions", older=_older)


def unique_slugs(prompts: Sequence[str]) -> list[str]:
    """A file name for each prompt, readable and unique; raises ConfigError for an empty prompt."""
    if not prompts:
        raise ConfigError('no prompt was given; give a sentence in quotes, such as "the red car"')
    slugs: list[str] = []
    for prompt in prompts:
        if not is_unicode(prompt):
            raise ConfigError(f"prompt {prompt!r} is not UTF-8; set a UTF-8 locale (LC_ALL=C.UTF-8) or type it again")
        if not has_words(clean(prompt, lowercase=True)):
            raise ConfigError(f'prompt {prompt!r} is empty; give a sentence, such as "the red car"')
        plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
        stem = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].rstrip("-") or "prompt"
        slugs.append(free_slug(stem, {OVERLAY, *slugs}))
    return slugs


def result_folders(out: Path, videos: Sequence[Path]) -> dict[Path, Path]:
    """Each video by the folder for its results: `out` for one, OUT/<video name> for each of several."""
    if len(videos) == 1:
        return {out: videos[0]}
    twice = [video for number, video in enumerate(videos) if video.resolve() in {v.resolve() for v in videos[:number]}]
    if twice:
        raise ConfigError(f"the video {twice[0]} is given twice; give it once")
    folders: dict[str, Path] = {}
    for video in videos:
        path = video.resolve()
        stem, taken = path.name if path.is_dir() else path.stem, set(map(same_file, folders))
        names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        folders[next(name for name in names if same_file(name) not in taken)] = video
    return {out / name: video for name, video in folders.items()}
