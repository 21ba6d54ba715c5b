"""Moving coloured shapes as arrays: the pictures and sentences of the synthetic dataset.

Makes the scenes (the objects and their motions), their pixels and visible masks, and the sentences with the set of
objects that each is true of. Pure: everything is a function of (seed, index of a block of scenes). A sentence
is kept only if its words determine its objects; these sets are computed by matching every object, never assumed.
Sentences that are true of no object are drawn separately and change nothing else.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.randomness import mix64

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 170, 55),
    "blue": (40, 75, 225),
    "yellow": (240, 215, 45),
    "purple": (190, 60, 215),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "still")
NOUNS = ("object", "thing", "shape")
STEPS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]], np.float32)  # x, y of each motion
STILL = MOTIONS.index("still")
OBJECTS = 3  # largest number in one scene
NO_SUCH_COLOUR, OTHER_MOTION = "no such colour", "other motion"  # kinds of sentences that name nothing
BLOCK = 128  # scenes drawn together: the number of requested scenes does not change scene i


@dataclass(frozen=True)
class SceneBlock:
    """`BLOCK` scenes: frames uint8 [N F H W 3] rgb8, visible masks bool [N OBJECTS F H W], and their sentences.

    sentences[i] is a tuple of (text, object numbers); object numbers beyond a scene's count never occur.
    nothing[i] is a tuple of (text, kind) of sentences that are true of no object.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    sentences: list[tuple[tuple[str, tuple[int, ...]], ...]]
    nothing: list[tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class _Objects:
    """The objects of N scenes: integer codes [N OBJECTS], positions [N OBJECTS F 2] and radii in pixels."""

    count: NDArray[np.int64]
    colour: NDArray[np.int64]
    shape: NDArray[np.int64]
    motion: NDArray[np.int64]
    radius: NDArray[np.float32]
    centre: NDArray[np.float32]


def draw_block(seed: int, block: int, *, frames: int, size: int, sentences: int = 5, no_target: int = 0) -> SceneBlock:
    """Draw block number `block` of the endless sequence of scenes of `seed`, `size` x `size` pixels."""
    rng = np.random.default_rng(mix64(seed, block))
    objects = _draw_objects(rng, frames, size)
    pixels, masks = _render(rng, objects, frames, size)
    texts = [_sentences(rng, objects, scene, sentences) for scene in range(BLOCK)]
    apart = np.random.default_rng(mix64(seed, block, 1))
    nothing = [_nothing(apart, objects, scene, no_target) for scene in range(BLOCK)]
    return SceneBlock(pixels, masks, texts, nothing)


def _draw_objects(rng: np.random.Generator, frames: int, size: int) -> _Objects:
    shape_nk = (BLOCK, OBJECTS)
    count = np.where(rng.random(BLOCK) < 0.6, 2, 3)
    colour = rng.integers(len(COLOURS), size=shape_nk)
    shape = rng.integers(len(SHAPES), size=shape_nk)
    motion = rng.integers(len(MOTIONS), size=shape_nk)
    kind = rng.random(BLOCK)
    twins, look_alikes, movers = kind < 0.3, kind < 0.45, (kind >= 0.45) & (kind < 0.6)
    colour[look_alikes, 1] = colour[look_alikes, 0]
    shape[twins, 1] = shape[twins, 0]
    other = (motion[:, 0] + rng.integers(1, len(MOTIONS), BLOCK)) % len(MOTIONS)
    motion[look_alikes, 1] = other[look_alikes]  # only the motion distinguishes equal objects
    motion[movers, 1] = motion[movers, 0]  # a motion that is true of two objects
    same = (colour[:, 1] == colour[:, 0]) & (shape[:, 1] == shape[:, 0]) & (motion[:, 1] == motion[:, 0])
    motion[same, 1] = other[same]

    radius = (size * rng.uniform(0.13, 0.19, shape_nk)).astype(np.float32)
    travel = (size * rng.uniform(0.13, 0.22, shape_nk)).astype(np.float32)
    centre = _place(rng, motion, radius, travel, frames, size)
    return _Objects(count, colour, shape, motion, radius, centre)


def _place(
    rng: np.random.Generator,
    motion: NDArray[np.int64],
    radius: NDArray[np.float32],
    travel: NDArray[np.float32],
    frames: int,
    size: int,
    candidates: int = 24,
) -> NDArray[np.float32]:
    """Paths [N OBJECTS F 2] that keep objects apart if possible; about one moving object in twelve leaves."""
    time = np.linspace(-0.5, 0.5, frames, dtype=np.float32) if frames > 1 else np.zeros(1, np.float32)
    step = STEPS[motion]
    leaving = (rng.random(motion.shape) < 0.08) & (motion != STILL)
    margin = radius + 0.5 * travel
    low = np.where(step != 0, margin[..., None], radius[..., None]) * 0.95
    middle = rng.uniform(size=(candidates, *motion.shape, 2)).astype(np.float32) * (size - 2 * low) + low
    # A leaving object is half inside in the first frame and outside in the last.
    travel = np.where(leaving, 1.6 * radius + 0.06 * size, travel)
    edge = np.where(step > 0, size + 0.25 * radius[..., None], -0.25 * radius[..., None])
    middle = np.where(leaving[..., None] & (step != 0), edge, middle)

    chosen: list[NDArray[np.float32]] = []
    scenes = np.arange(BLOCK)
    for k in range(motion.shape[1]):
        offset = (step * travel[..., None])[:, k, None, :] * time[:, None]
        paths = middle[:, :, k, None, :] + offset
        room = np.full((candidates, BLOCK), np.inf, np.float32)
        for j, placed in enumerate(chosen):
            apart = np.linalg.norm(paths - placed, axis=-1).min(-1) - radius[:, k] - radius[:, j]
            room = np.minimum(room, apart)
        roomy = np.minimum(room, 2.0)  # two pixels of distance suffice: the first such candidate wins
        chosen.append(paths[roomy.argmax(0), scenes])
    return np.stack(chosen, axis=1)


def _render(
    rng: np.random.Generator, objects: _Objects, frames: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Paint the objects over the backgrounds in order; a later object hides an earlier one, also in the masks."""
    canvas = np.repeat(_backgrounds(rng, size)[:, None], frames, axis=1)
    masks = np.zeros((BLOCK, OBJECTS, frames, size, size), bool)
    palette = np.array(list(COLOURS.values()), np.float32)
    paint = np.clip(palette[objects.colour] + rng.normal(0, 8, (BLOCK, OBJECTS, 3)), 0, 255).astype(np.float32)
    for k in range(OBJECTS):
        present = k < objects.count
        cover = _coverage(objects, k, size) * present[:, None, None, None]
        canvas += cover[..., None] * (paint[:, k, None, None, None] - canvas)
        inside = cover > 0.5
        masks[:, :k] &= ~inside[:, None]
        masks[:, k] = inside
    noise = rng.normal(0, 2.0, (BLOCK, 1, size, size, 1)).astype(np.float32)
    return np.clip(canvas + noise + 0.5, 0, 255).astype(np.uint8), masks


def _coverage(objects: _Objects, k: int, size: int) -> NDArray[np.float32]:
    """Share of every pixel inside object k: float [N F H W], from the signed distance to its outline."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    x = (grid - objects.centre[:, k, :, 0, None])[:, :, None, :]
    y = (grid - objects.centre[:, k, :, 1, None])[:, :, :, None]
    r = objects.radius[:, k, None, None, None]
    distance = np.empty((x.shape[0], x.shape[1], size, size), np.float32)
    circle, square, triangle = (objects.shape[:, k] == s for s in range(len(SHAPES)))
    distance[circle] = np.sqrt(x[circle] ** 2 + y[circle] ** 2) - r[circle]
    distance[square] = np.maximum(np.abs(x[square]), np.abs(y[square])) - 0.87 * r[square]
    slope = np.float32(np.sqrt(0.8)), np.float32(np.sqrt(0.2))
    sides = slope[0] * np.abs(x[triangle]) - slope[1] * (y[triangle] + 1.1 * r[triangle])
    distance[triangle] = np.maximum(sides, y[triangle] - 0.85 * r[triangle])
    return np.clip(0.5 - distance, 0, 1)


def _backgrounds(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Muted backgrounds float [N H W 3]: plain, gradient, soft blobs or stripes, less vivid than any object."""
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi, (BLOCK, 1, 1)).astype(np.float32)
    ramp = np.cos(angle) * grid[None, None, :] + np.sin(angle) * grid[None, :, None]
    stripes = np.sin(ramp * rng.uniform(6, 20, (BLOCK, 1, 1)).astype(np.float32))
    coarse = rng.normal(0, 1, (BLOCK, 7, 7)).astype(np.float32)
    place = np.linspace(0, 5.999, size)
    cell, part = place.astype(int), (place % 1).astype(np.float32)
    rows = coarse[:, cell] * (1 - part)[:, None] + coarse[:, cell + 1] * part[:, None]
    blobs = rows[:, :, cell] * (1 - part) + rows[:, :, cell + 1] * part
    kind = rng.integers(4, size=BLOCK)
    pattern = np.choose(kind[:, None, None], [np.zeros_like(ramp), ramp, blobs, 0.5 * stripes])
    grey = rng.uniform(45, 150, (BLOCK, 1, 1, 1))
    tint = rng.uniform(-18, 18, (BLOCK, 1, 1, 3))
    contrast = rng.uniform(8, 26, (BLOCK, 1, 1, 1))
    return (grey + tint + contrast * pattern[..., None]).astype(np.float32)


def _sentences(
    rng: np.random.Generator, objects: _Objects, scene: int, wanted: int
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Up to `wanted` true sentences of one scene: one per distinguishable object, then by motion, then any."""
    traits = _traits(objects, scene)
    number = len(traits)
    sets: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for trait, use in product(traits, product((False, True), repeat=3)):
        words = tuple(int(value) if used else -1 for value, used in zip(trait, use, strict=True))
        named = tuple(k for k in range(number) if _matches(traits[k], words))
        if any(use) and len(named) < number and words not in sets.setdefault(named, []):
            sets[named].append((words[0], words[1], words[2]))
    options = [(named, words) for named, group in sets.items() for words in group]
    order = [options[i] for i in rng.permutation(len(options))]
    picked: list[tuple[tuple[int, ...], tuple[int, int, int]]] = []
    for named in sets:  # one sentence for each set of objects that words can name
        picked.append(next(option for option in order if option[0] == named))
    by_motion = [option for option in order if option[1][2] >= 0 and option not in picked]
    picked += by_motion[:2] + [option for option in order if option not in picked and option not in by_motion[:2]]
    return tuple((_phrase(rng, words, plural=len(named) > 1), named) for named, words in picked[:wanted])


def _nothing(rng: np.random.Generator, objects: _Objects, scene: int, wanted: int) -> tuple[tuple[str, str], ...]:
    """`wanted` sentences about no object, with alternating kinds; fewer if a kind has no more sentences."""
    traits = _traits(objects, scene)
    absent = sorted(set(range(len(COLOURS))) - {colour for colour, _, _ in traits})
    options: dict[str, list[tuple[int, int, int]]] = {NO_SUCH_COLOUR: [], OTHER_MOTION: []}
    for colour in absent:
        shape, motion = int(rng.integers(len(SHAPES))), int(rng.integers(len(MOTIONS)))
        options[NO_SUCH_COLOUR] += [(colour, s, m) for s, m in product((-1, shape), (-1, motion))]
    for (colour, shape), motion in product(sorted({trait[:2] for trait in traits}), range(len(MOTIONS))):
        if (colour, shape, motion) not in traits:
            options[OTHER_MOTION].append((colour, shape, motion))
    picked = []
    for turn in range(wanted):
        kind = (NO_SUCH_COLOUR, OTHER_MOTION)[(scene + turn) % 2]
        if left := options[kind]:
            picked.append((_phrase(rng, left.pop(rng.integers(len(left))), plural=False), kind))
    return tuple(picked)


def _traits(objects: _Objects, scene: int) -> list[tuple[int, int, int]]:
    """Colour, shape and motion of each object of a scene."""
    traits = zip(objects.colour[scene], objects.shape[scene], objects.motion[scene], strict=True)
    return list(traits)[: int(objects.count[scene])]


def _matches(trait: tuple[int, int, int], words: tuple[int, ...]) -> bool:
    return all(word in (-1, value) for value, word in zip(trait, words, strict=True))


def _phrase(rng: np.random.Generator, words: tuple[int, int, int], *, plural: bool) -> str:
    colour, shape, motion = words
    noun = SHAPES[shape] if shape >= 0 else NOUNS[rng.integers(len(NOUNS))]
    parts = ["the", *([list(COLOURS)[colour]] if colour >= 0 else []), noun + "s" * plural]
    if motion == STILL:
        parts.append(("that stay still" if plural else "that stays still", "not moving")[rng.integers(2)])
    elif motion >= 0:
        verb = ("moving", "that move" if plural else "that moves", "going")[rng.integers(3)]
        parts.append(f"{verb} {MOTIONS[motion]}")
    return " ".join(parts)
