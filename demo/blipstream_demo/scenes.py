"""The rendered world of the demo checkpoint: seed -> scene -> image, captions, questions, and their judges.

One to three objects (shape, colour, size) at any position on a varied, noisy background; objects may overlap
partly. Needs Pillow and NumPy only, so that tests and benchmarks of the server can import it.

Scenes are numbered within a split: ``scene("test", 7)`` is the same scene everywhere. The splits draw from
disjoint seeds. Every fifth test scene shows at least one of the attribute triples in :data:`HELD_OUT`, which
no training or validation scene (nor any training text) contains; every pair of attributes does occur there.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
"""Side of a rendered image in pixels, and of the model's input."""

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES = ("small", "large")
COUNTS = ("one", "two", "three")

_RGB = {
    "red": (220, 25, 30),
    "orange": (255, 135, 0),
    "yellow": (250, 235, 30),
    "green": (20, 160, 50),
    "blue": (30, 70, 230),
    "purple": (160, 40, 190),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
_RADIUS = {"small": (0.125, 0.145), "large": (0.215, 0.245)}  # of the image's side
_SPLITS = {"train": 1, "val": 2, "test": 3}
_CROWD = 4
_MIN_DX = 0.13  # between centres, so that "left to right" is never in doubt
_MIN_GAP = 0.78  # distance between centres over the sum of the radii: below 1, shapes may overlap

Triple = tuple[str, str, str]

HELD_OUT: frozenset[Triple] = frozenset(
    (SIZES[i % 2], colour, SHAPES[(2 * i) % len(SHAPES)]) for i, colour in enumerate(COLOURS)
)
"""(size, colour, shape) triples that only test scenes show: one for each colour."""


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, the centre and the radius as fractions of the image's side, its turn in degrees."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    turn: float

    @property
    def triple(self) -> Triple:
        return (self.size, self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """Objects from left to right, and the seed of everything else that is drawn."""

    seed: tuple[int, int]
    things: tuple[Thing, ...]

    @property
    def triples(self) -> tuple[Triple, ...]:
        return tuple(thing.triple for thing in self.things)

    @property
    def has_held_out(self) -> bool:
        return any(triple in HELD_OUT for triple in self.triples)


@dataclass(frozen=True)
class Question:
    """A question about a scene; ``kind`` is one of :data:`KINDS`, ``answer`` the one right answer."""

    kind: str
    text: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.text} Answer:"


# --- scenes ---------------------------------------------------------------------------------------------------------


def scene(split: str, index: int) -> Scene:
    """The scene number ``index`` of ``split`` ("train", "val" or "test"). Raises KeyError for another split."""
    seed = (_SPLITS[split], index)
    rng = np.random.default_rng(seed)
    count = 1 + index % 3
    held_out = int(rng.integers(count)) if split == "test" and index % 5 == 0 else None
    while True:
        things = tuple(_thing(rng, position == held_out) for position in range(count))
        if _arranged(things):
            return Scene(seed, tuple(sorted(things, key=lambda thing: thing.x)))


def crowd(index: int) -> Scene:
    """Four to seven objects in any order: only the vision encoder's pre-training sees such scenes. No held-out triple,
    and a seed of its own."""
    seed = (_CROWD, index)
    rng = np.random.default_rng(seed)
    things: list[Thing] = []
    for _ in range(60):
        thing = _thing(rng, held_out=False)
        if thing.size == "large" and rng.random() < 0.4:
            continue
        if all(math.hypot(thing.x - o.x, thing.y - o.y) > _MIN_GAP * (thing.radius + o.radius) for o in things):
            things.append(thing)
        if len(things) == 7:
            break
    return Scene(seed, tuple(things))


def test_scenes(count: int) -> list[Scene]:
    """The first ``count`` test scenes; the model card's figures are those of the first 1,000."""
    return [scene("test", index) for index in range(count)]


test_scenes.__test__ = False  # type: ignore[attr-defined]  # the name is for readers, not for pytest's collector


def _thing(rng: np.random.Generator, held_out: bool) -> Thing:
    options = sorted(HELD_OUT) if held_out else _TRIPLES
    size, colour, shape = options[int(rng.integers(len(options)))]
    radius = float(rng.uniform(*_RADIUS[size]))
    x, y = rng.uniform(radius * 0.9, 1 - radius * 0.9, size=2)
    return Thing(size, colour, shape, float(x), float(y), radius, float(rng.uniform(-8, 8)))


def _arranged(things: tuple[Thing, ...]) -> bool:
    """Whether centres lie apart, along x and in the plane, so that order is plain and overlap partial."""
    for i, a in enumerate(things):
        for b in things[:i]:
            if abs(a.x - b.x) < _MIN_DX:
                return False
            if math.hypot(a.x - b.x, a.y - b.y) < _MIN_GAP * (a.radius + b.radius):
                return False
    return len({thing.triple for thing in things}) == len(things)


_TRIPLES: list[Triple] = [
    (size, colour, shape)
    for size in SIZES
    for colour in COLOURS
    for shape in SHAPES
    if (size, colour, shape) not in HELD_OUT
]


# --- drawing --------------------------------------------------------------------------------------------------------


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene as an RGB image of ``size`` x ``size`` pixels, a multiple of IMAGE_SIZE.

    A larger rendering shows the same scene, noise included; scaled down, it is close to the small one.
    """
    return render_with_labels(scene, size)[0]


def render_with_labels(scene: Scene, size: int = IMAGE_SIZE) -> tuple[Image.Image, np.ndarray]:
    """As :func:`render`, and which object is seen where: (24, 24) uint8, one sample for each 24th of the side, 0 for
    the background, else 1 + the object's place from the left."""
    if size < IMAGE_SIZE or size % IMAGE_SIZE:
        raise ValueError(f"size {size} is not a multiple of {IMAGE_SIZE}")
    rng = np.random.default_rng((*scene.seed, 1))
    canvas = _background(rng).resize((2 * size, 2 * size), Image.Resampling.BILINEAR)
    labels = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    draw, draw_labels = ImageDraw.Draw(canvas), ImageDraw.Draw(labels)
    for position in rng.permutation(len(scene.things)):
        thing = scene.things[position]
        _draw(draw, thing, 2 * size, _shade(thing.colour, rng))
        _draw(draw_labels, thing, IMAGE_SIZE, int(position) + 1)
    noise = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    noise *= np.float32(rng.uniform(2, 12))
    if size > IMAGE_SIZE:
        noise = noise.repeat(size // IMAGE_SIZE, 0).repeat(size // IMAGE_SIZE, 1)
    noise += np.asarray(canvas.reduce(2))
    np.clip(noise, 0, 255, out=noise)
    return Image.fromarray(noise.astype(np.uint8)), np.asarray(labels)[2::4, 2::4]


def _background(rng: np.random.Generator) -> Image.Image:
    """A muted background to be scaled up: plain, a gradient, blotches, or broad faint stripes."""
    style = int(rng.integers(4))
    base = _muted(rng)
    cells = np.empty((6, 6, 3), np.float32)
    cells[:] = base
    if style == 1:
        ramp = np.linspace(0, 1, 6, dtype=np.float32)[:, None, None]
        cells = base + ramp * (_muted(rng) - base) + np.zeros_like(cells)
        cells = cells if rng.random() < 0.5 else cells.transpose(1, 0, 2)
    elif style == 2:
        cells += rng.uniform(-28, 28, size=(6, 6, 1)) + rng.uniform(-10, 10, size=(6, 6, 3))
    elif style == 3:
        cells += 14 * np.where(np.arange(6) % 2, 1, -1)[:, None, None]
        cells = cells if rng.random() < 0.5 else cells.transpose(1, 0, 2)
    return Image.fromarray(np.clip(cells, 0, 255).astype(np.uint8))


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) of little saturation and middling brightness, unlike that of any object."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.22), rng.uniform(0.38, 0.72))
    return np.asarray(rgb, np.float32) * 255


def _shade(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = np.clip(np.asarray(_RGB[colour]) + rng.integers(-12, 13, size=3), 0, 255)
    return int(r), int(g), int(b)


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, side: int, fill: tuple[int, int, int] | int) -> None:
    cx, cy, r = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape == "circle":
        r *= 0.95
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        return
    cos, sin = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
    corners = [(cx + r * (x * cos - y * sin), cy + r * (x * sin + y * cos)) for x, y in _OUTLINES[thing.shape]]
    draw.polygon(corners, fill=fill)


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        reach = 1.1 if i % 2 == 0 else 0.46
        points.append((reach * math.sin(i * math.pi / 5), -reach * math.cos(i * math.pi / 5)))
    return points


_A = 0.34  # half the width of a cross's arm
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "star": _star(),
    "cross": [
        (-_A, -1),
        (_A, -1),
        (_A, -_A),
        (1, -_A),
        (1, _A),
        (_A, _A),
        (_A, 1),
        (-_A, 1),
        (-_A, _A),
        (-1, _A),
        (-1, -_A),
        (-_A, -_A),
    ],
}


# --- questions ------------------------------------------------------------------------------------------------------

KINDS = ("colour", "shape", "size", "count", "existence", "place", "relation")
"""What questions ask about. "place" asks what is leftmost or rightmost, "relation" whether x is left of y."""

_SIZE, _COLOUR, _SHAPE = 0, 1, 2
_FORMS = {
    "colour": ("What colour is {}?", "Which colour is {}?", "What is the colour of {}?", "What colour does {} have?"),
    "shape": ("What shape is {}?", "Which shape is {}?", "What is the shape of {}?", "What shape does {} have?"),
    "size": ("How big is {}?", "What size is {}?", "What is the size of {}?", "Is {} small or large?"),
    "count": (
        "How many objects are there?",
        "How many objects are in the picture?",
        "How many objects can you see?",
        "What is the number of objects?",
    ),
    "existence": ("Is there {}?", "Is there {} in the picture?", "Does the picture show {}?", "Can you see {}?"),
    "place": ("What is {}?", "Which object is {}?", "What can you see {}?"),
    "relation": ("Is {} to the {} of {}?", "Is {} on the {} of {}?"),
}
_PLACES = (("on the far left", "leftmost"), ("on the far right", "rightmost"))


def questions(scene: Scene, variant: int = 0) -> list[Question]:
    """One question of each kind that fits the scene, in the order of :data:`KINDS`; another ``variant`` asks others.

    No question names size, colour and shape together, so none tells of a held-out triple.
    """
    rng = np.random.default_rng((*scene.seed, 2, variant))
    asked = [
        _ask_attribute(scene, "colour", _COLOUR, ((_SHAPE,), (_SIZE, _SHAPE), (_SIZE,), ()), rng),
        _ask_attribute(scene, "shape", _SHAPE, ((_COLOUR,), (_SIZE, _COLOUR), (_SIZE,), ()), rng),
        _ask_attribute(scene, "size", _SIZE, ((_COLOUR, _SHAPE), (_COLOUR,), (_SHAPE,), ()), rng),
        Question("count", _form("count", rng), COUNTS[len(scene.things) - 1]),
        _ask_existence(scene, rng),
        _ask_place(scene, rng),
        _ask_relation(scene, rng),
    ]
    return [question for question in asked if question]


def _form(kind: str, rng: np.random.Generator) -> str:
    return str(_FORMS[kind][int(rng.integers(len(_FORMS[kind])))])


def _pick(rng: np.random.Generator, options: list[tuple[int, tuple[int, ...]]]) -> tuple[int, tuple[int, ...]]:
    return options[int(rng.integers(len(options)))]


def _phrase(triple: Triple, named: tuple[int, ...]) -> str:
    """The attributes of ``named`` in a noun phrase without article: "small star", "red object", "object"."""
    words = [triple[part] for part in (_SIZE, _COLOUR) if part in named]
    return " ".join([*words, triple[_SHAPE] if _SHAPE in named else "object"])


def _matches(scene: Scene, triple: Triple, named: tuple[int, ...]) -> int:
    """How many objects agree with ``triple`` in the ``named`` attributes."""
    return sum(all(other[part] == triple[part] for part in named) for other in scene.triples)


def _ask_attribute(
    scene: Scene, kind: str, part: int, namings: tuple[tuple[int, ...], ...], rng: np.random.Generator
) -> Question | None:
    """Ask for an attribute of an object that the phrase singles out."""
    options = [
        (i, named) for i, triple in enumerate(scene.triples) for named in namings if _matches(scene, triple, named) == 1
    ]
    form = _form(kind, rng)
    if not options:
        return None
    i, named = _pick(rng, options)
    triple = scene.triples[i]
    return Question(kind, form.format("the " + _phrase(triple, named)), triple[part])


def _ask_existence(scene: Scene, rng: np.random.Generator) -> Question:
    """Yes and no alike often; most absent things differ from a present one in a single attribute."""
    namings = ((_COLOUR, _SHAPE), (_COLOUR, _SHAPE), (_COLOUR,), (_SHAPE,), (_SIZE, _SHAPE), (_SIZE, _COLOUR))
    present, form = bool(rng.random() < 0.5), _form("existence", rng)
    while True:
        named = namings[int(rng.integers(len(namings)))]
        triple = list(scene.triples[int(rng.integers(len(scene.triples)))])
        if not present:
            for part in named if rng.random() < 0.25 else (named[int(rng.integers(len(named)))],):
                values = (SIZES, COLOURS, SHAPES)[part]
                triple[part] = values[int(rng.integers(len(values)))]
        candidate: Triple = (triple[0], triple[1], triple[2])
        if (_matches(scene, candidate, named) > 0) == present:
            phrase = _phrase(candidate, named)
            article = "an" if phrase[0] in "aeiou" else "a"
            return Question("existence", form.format(f"{article} {phrase}"), "yes" if present else "no")


def _ask_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    side, form, word = int(rng.integers(2)), _form("place", rng), int(rng.integers(2))
    if len(scene.things) < 2:
        return None
    place = "the " + _PLACES[side][1] if form.startswith("Which") and word else _PLACES[side][0]
    return Question("place", form.format(place), " ".join(scene.triples[-side]))


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Only where colour and shape single out at least two objects."""
    named = (_COLOUR, _SHAPE)
    options = [i for i, triple in enumerate(scene.triples) if _matches(scene, triple, named) == 1]
    form, side = _form("relation", rng), int(rng.integers(2))
    if len(options) < 2:
        return None
    a, b = (int(i) for i in rng.choice(options, 2, replace=False))
    phrases = [f"the {_phrase(scene.triples[i], named)}" for i in (a, b)]
    text = form.format(phrases[0], ("left", "right")[side], phrases[1])
    return Question("relation", text, "yes" if (a < b) == (side == 0) else "no")


_RELATION = re.compile(r"Is (the .*) (?:to|on) the (left|right) of (the .*)\?")


def relation_of(question: Question) -> tuple[str, str, str]:
    """What a question about a relation asks: x, the side, and y of "is x to the ... of y?"."""
    x, side, y = _RELATION.fullmatch(question.text).groups()
    return x, side, y


# --- captions -------------------------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """The caption, objects from left to right: "a large red circle, a small blue star and a small green cross"."""
    return caption_of(scene.triples)


def caption_of(triples: Sequence[Triple]) -> str:
    """The caption of objects given from left to right."""
    return join([f"a {' '.join(triple)}" for triple in triples])


def join(phrases: list[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


_PHRASE = re.compile(rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


def parse_caption(text: str) -> tuple[Triple, ...] | None:
    """The (size, colour, shape) triples that a caption names, in its order; None if it says anything else."""
    phrases = re.split(r", | and ", text.strip().rstrip("."))
    matches = [_PHRASE.fullmatch(phrase) for phrase in phrases]
    if not all(matches):
        return None
    return tuple((m[1], m[2], m[3]) for m in matches if m)


def caption_is_right(text: str, scene: Scene) -> bool:
    """Whether a caption names every object with every attribute right and nothing else, in any order."""
    named = parse_caption(text)
    return named is not None and sorted(named) == sorted(scene.triples)


def caption_is_exact(text: str, scene: Scene) -> bool:
    """Whether a caption is word for word the scene's own (so the order is right as well)."""
    return text.strip() == caption(scene)


def answer_is_right(text: str, question: Question) -> bool:
    """Whether an answer is the right one, but for case, white space and a full stop."""
    return text.strip().rstrip(".").lower() == question.answer
