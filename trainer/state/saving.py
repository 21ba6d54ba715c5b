"""The checkpoints of one run: the joint decisions of all ranks about saving, and the restore of a run.

A save begins between two steps with host copies; each rank's thread writes its file, rank 0's then publishes.
The main threads collect the threads' results between two later steps (`advance`), so no collective runs in
parallel to the training's. Only one save is in flight: the next one waits for it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flowmask.models.errors import CheckpointError, WeightsError
from flowmask.models.strict import refuse_not_finite
from flowmask.trainer import distributed
from flowmask.trainer.config import CheckpointConfig
from flowmask.trainer.state.checkpoint import Piece, fill, read_state, refuse_other_parameters, verify
from flowmask.trainer.state.checkpoint_write import Background, Snapshot, clean, point_to, prune, publish, remove
from flowmask.trainer.state.document import FORMAT
from flowmask.trainer.state.steps import complete, newest_of
from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine


@dataclass
class _Flight:
    """A save in flight: first every rank writes its file, then rank 0 publishes; `work` is this rank's part."""

    step: int
    beside: Path
    final: Path
    links: tuple[str, ...]
    document: dict[str, Any]
    work: Background | None = None
    publishing: bool = False
    before_publish: Callable[[], None] = field(default=lambda: None)


class Checkpoints:
    """The checkpoints in `folder`. Public methods are collective; only rank 0 renames folders.

    saved_step: the last saved or restored step; -1 initially
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: CheckpointConfig,
        warn: Callable[[str], None],
        on_saved: Callable[[Path], None] = lambda path: None,
    ):
        self.folder, self.saved_step = folder, -1
        self._config, self._warn, self._on_saved = config, warn, on_saved
        self._snapshot = Snapshot()
        self._flight: _Flight | None = None
        self._begun = 0
        self._problem: str | None = None

    def clean(self) -> None:
        """Remove the partial files of a killed process."""
        if distributed.rank() == 0:
            clean(self.folder)
        distributed.barrier()

    def covers(self, step: int) -> bool:
        """Whether `step` is saved or being saved."""
        return step == (self._flight.step if self._flight is not None else self.saved_step)

    def require(self, step: int) -> None:
        """Wait until `step` is saved; raises CheckpointError on every rank if one can't write it (full disk, NaN)."""
        self.settle()
        if self.saved_step != step:
            raise CheckpointError(f"cannot write the checkpoint of step {step}: {self._problem}")

    def begin(
        self,
        engine: Engine,
        ema: ShardedEma,
        *,
        step: int,
        state: Mapping[str, Any],
        best: bool = False,
        before_publish: Callable[[], None] = lambda: None,
    ) -> None:
        """Start saving `step` with the caller's JSON `state`; returns as soon as the host copies are made.

        best: also point the link `best` to it; before_publish: called on rank 0, in its thread
        """
        self.settle()
        self._begun += 1
        final = self.folder / f"step_{step:08d}"
        beside = self.folder / f".writing_{final.name}_{self._begun}"  # never the folder of a failed attempt
        document = {
            "format": FORMAT,
            "step": step,
            "updates": engine.updates,
            "ema_updates": ema.updates,
            "world_size": distributed.world_size(),
            "zero_stage": engine.zero_stage,
            "parameters": {key: list(shape) for key, shape in engine.shapes.items()},
            "state": dict(state),
        }
        links = ("latest", "best") if best else ("latest",)
        self._snapshot.take(engine, ema)
        self._flight = _Flight(step, beside, final, links, document, before_publish=before_publish)
        self._flight.work = Background(partial(self._snapshot.write, beside / _file_of(distributed.rank())))

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still working; not collective."""
        return self._flight is not None and self._flight.work is not None and self._flight.work.busy

    def advance(self) -> None:
        """Collect the results of the threads and let rank 0 publish; waits for busy threads."""
        flight = self._flight
        if flight is None:
            return
        outcomes = distributed.gather_objects(flight.work.outcome() if flight.work else (None, None))
        problem = next((said for _, said in outcomes if said is not None), None)
        if problem is not None:
            self._give_up(flight, problem)
        elif flight.publishing:
            self._flight, self.saved_step, self._problem = None, flight.step, None
            if outcomes[0][0]:
                self._warn(outcomes[0][0])
            self._on_saved(flight.final)
        else:
            flight.document["files"] = {_file_of(rank): facts for rank, (facts, _) in enumerate(outcomes)}
            flight.work = Background(partial(self._publish, flight)) if distributed.rank() == 0 else None
            flight.publishing = True

    def settle(self) -> None:
        """Wait until no save is in flight; a failed one has been reported."""
        while self._flight is not None:
            self.advance()

    def mark_best(self) -> None:
        """Point `best` to the newest checkpoint."""
        self.settle()
        if distributed.rank() == 0:
            point_to(self.folder / f"step_{self.saved_step:08d}", "best")

    def _publish(self, flight: _Flight) -> str | None:
        """Runs in rank 0's thread; returns a warning if old checkpoints could not be deleted."""
        flight.before_publish()
        publish(flight.beside, flight.final, document=flight.document, links=flight.links)
        try:
            prune(
                self.folder, keep_last=self._config.keep_last, milestone_every_steps=self._config.milestone_every_steps
            )
        except OSError as error:
            return f"{self.folder}: an old checkpoint could not be deleted ({error})"
        return None

    def _give_up(self, flight: _Flight, problem: str) -> None:
        self._flight, self._problem = None, problem
        if distributed.rank() != 0:
            return
        self._warn(f"the checkpoint of step {flight.step} could not be written: {problem}; the next save will retry")
        with suppress(OSError):  # the next start cleans up
            remove(flight.beside)

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint, None if there are none; raises CheckpointError if all are damaged."""
        found = distributed.broadcast_object([str(path) for path in complete(self.folder)])
        try:
            return newest_of(list(map(Path, found)), damage=self._damage)
        except CheckpointError as error:
            raise CheckpointError(
                f"no usable checkpoint in {self.folder}: {error}. Move it away to start again"
            ) from None

    def _damage(self, path: Path) -> str | None:
        """The first rank's finding about `path`; each rank checks its share of the files."""
        mine: str | None = None
        try:
            verify(path, share=distributed.rank(), shares=distributed.world_size())
        except CheckpointError as error:
            mine = str(error)
        problem = next((problem for problem in distributed.gather_objects(mine) if problem), None)
        if problem is not None and distributed.rank() == 0:
            self._warn(f"{problem}; using the previous checkpoint")
        return problem

    def restore(self, engine: Engine, ema: ShardedEma, path: Path) -> dict[str, Any]:
        """Fill masters, moments, EMA and counters from `path`, at any world size and stage.

        Raises CheckpointError if the parameters do not fit the model or an element is missing, stored twice or not
        finite.
        """
        document, world = read_state(path), distributed.world_size()
        refuse_other_parameters(path, document["parameters"], engine.shapes)
        pieces = [
            Piece(piece.name, kind, piece.start, tensor)
            for piece in engine.held_fragments()
            for kind, tensor in piece.tensors().items()
        ]
        pieces += [
            Piece(piece.name, "ema", piece.start, shadow)
            for piece, shadow in zip(engine.fragments(), ema.shadow, strict=True)
        ]
        problem: str | None = None
        try:
            fill(pieces, [path / name for name in nearest_first(document["files"], distributed.rank(), world)])
            tensors = ((f"{piece.kind} of {piece.name}", piece.target) for piece in pieces)
            refuse_not_finite(tensors, where=path, fix="move it away to continue from the previous checkpoint")
        except (CheckpointError, WeightsError) as error:
            problem = str(error)
        for complaint in distributed.gather_objects(problem):
            if complaint:
                raise CheckpointError(complaint)
        engine.set_updates(document["updates"])
        ema.updates = document["ema_updates"]
        engine.refresh_weights()
        self.saved_step = document["step"]
        return dict(document["state"])


def nearest_first(files: Iterable[str], rank: int, world: int) -> list[str]:
    """The files of a checkpoint; those with this rank's part of the parameters come first.

    Ranks hold pieces in the order of their numbers, so a rank opens few files for any number of writing ranks.
    """
    names = sorted(files)
    middle = (rank + 0.5) * len(names) / world
    return [names[place] for place in sorted(range(len(names)), key=lambda place: abs(place + 0.5 - middle))]


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
