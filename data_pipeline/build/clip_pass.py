"""The clips of a build, unit by unit: the work of each pipeline stage.

The unit alone decides the content of its shard. An unreadable clip is quarantined; the other clips continue. Encoder
and embeddings are passed in: this file does not import torch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flowmask.data_pipeline.build import records
from flowmask.data_pipeline.build.pipeline import Pipeline, PipelineStages, UnitInHand
from flowmask.data_pipeline.build.stage_clock import StageClock
from flowmask.data_pipeline.cache.quarantine import Line, Quarantine, line
from flowmask.data_pipeline.clip.clips import Clip
from flowmask.data_pipeline.clip.decode import DecodedClip, decode
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan import units
from flowmask.data_pipeline.sources.base import VideoSet
from flowmask.models.errors import DataError, TakenOverError

if TYPE_CHECKING:
    from flowmask.data_pipeline.build.encode import ClipEncoder, EncodedClip
    from flowmask.data_pipeline.build.sentences import Embeddings

Planned = tuple[Clip, tuple[int, ...]]  # a clip and the numbers of its sentences


@dataclass
class _Tally:
    """Results of the clips of one unit."""

    dropped: int = 0  # empty masks
    lost: list[Line] = field(default_factory=list)


@dataclass
class ClipPass:
    """One worker's clips. `on_clip` receives the number of encoded clips in the current unit."""

    config: CacheBuildConfig
    plan: units.BuildPlan
    source: VideoSet
    shards: Path
    embeddings: "Embeddings"
    quarantine: Quarantine
    encoder: "Callable[[], ClipEncoder]"
    made_with: dict[str, str]
    clock: StageClock = field(default_factory=StageClock)
    on_clip: Callable[[int], None] = lambda _: None
    _tallies: dict[int, _Tally] = field(default_factory=dict)
    _taken_over: bool = False

    def run(self, claimed: Callable[[], Iterator[tuple[int, ExitStack]]]) -> None:
        """Encode and write every unit from `claimed`, until it has no more."""
        while True:
            self._taken_over = False
            self._pipeline().run(claimed())
            if not self._taken_over:
                return

    def write_unit(self, unit: int) -> None:
        """Make one unit without a claim; an unreadable clip is left out, as in a build."""
        self._pipeline().run(iter([(unit, ExitStack())]))

    def encode_unit(self, unit: int) -> "list[EncodedClip]":
        """The clips of a unit, encoded on the fly: exactly the content of its shard. DataError: unreadable."""
        decoded = (self.decoded(clip) for clip, _ in self.plan.unit_clips(unit))
        return list(self.encoder().encode(decoded))

    def _pipeline(self) -> "Pipeline[Planned, DecodedClip | Line, EncodedClip]":
        cache = self.config.cache
        stages = PipelineStages(items=self._begin, decode=self._decode, encode=self._encode, write=self._write)
        ahead = cache.batch_clips + cache.decode_threads
        return Pipeline(stages, decode_threads=cache.decode_threads, ahead=ahead)

    @cached_property
    def _roots(self) -> list[Path]:
        return [Path(source.root) for source in self.config.sources]

    def _begin(self, unit: int) -> list[Planned]:
        self.quarantine.begin(unit)
        self._tallies[unit] = _Tally()
        return self.plan.unit_clips(unit)

    def decoded(self, clip: Clip) -> DecodedClip:
        """Pixels of a clip; DataError: unreadable."""
        with self.clock.measure("decode"):
            video = self.source.videos()[clip.video]
            return decode(clip, video, drop_empty_masks=self.config.cache.drop_empty_masks)

    def _decode(self, planned: Planned) -> DecodedClip | Line:
        clip = planned[0]
        try:
            return self.decoded(clip)
        except DataError as error:
            return line(error, video_id=clip.label, clip=clip.key, roots=self._roots)

    def _encode(self, unit: UnitInHand[Planned], decoded: Iterator[DecodedClip | Line]) -> "Iterable[EncodedClip]":
        tally = self._tallies[unit.number]

        def readable() -> Iterator[DecodedClip]:
            for count, (outcome, (clip, _)) in enumerate(zip(decoded, unit.items, strict=True), 1):
                if isinstance(outcome, DecodedClip):
                    tally.dropped += len(clip.masks) - len(outcome.masks)
                    yield outcome
                else:
                    tally.lost.append(outcome)
                    self.quarantine.add(unit.number, tally.lost)
                self.on_clip(count)

        return self.encoder().encode(readable())

    def _write(self, unit: UnitInHand[Planned], encoded: "Iterator[EncodedClip]") -> None:
        numbers = {clip.key: texts for clip, texts in unit.items}
        tally = self._tallies[unit.number]
        try:
            records.write_unit(
                self.shards,
                unit.number,
                ((clip, numbers[clip.clip.key]) for clip in encoded),
                embeddings=self.embeddings,
                outcome=lambda: (tally.dropped, tally.lost),
                made_with=self.made_with,
                clock=self.clock,
            )
        except TakenOverError:
            self._taken_over = True  # the other worker's result is as good; checked again at the end
        del self._tallies[unit.number]
