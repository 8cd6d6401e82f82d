"""The rendered world: seeds, splits, held-out triples, drawing, questions and judges."""

import itertools
from collections import Counter

import numpy as np
import pytest
from blipstream_demo import scenes
from blipstream_demo.scenes import HELD_OUT, Question, Scene, Thing


def make_scene(*triples):
    things = [Thing(*triple, x=0.2 + 0.3 * i, y=0.5, radius=0.13, turn=0) for i, triple in enumerate(triples)]
    return Scene((9, 9), tuple(things))


def test_a_scene_is_the_same_every_time():
    assert scenes.scene("test", 7) == scenes.scene("test", 7)
    assert scenes.render(scenes.scene("test", 7)).tobytes() == scenes.render(scenes.scene("test", 7)).tobytes()


def test_splits_share_no_scene():
    drawn = [scenes.scene(split, i) for split in ("train", "val", "test") for i in range(200)]
    positions = {tuple((thing.x, thing.y) for thing in scene.things) for scene in drawn}
    assert len({scene.seed for scene in drawn}) == len(positions) == len(drawn)


def test_an_unknown_split_is_refused():
    with pytest.raises(KeyError):
        scenes.scene("tests", 0)


def test_held_out_triples_are_only_in_every_fifth_test_scene():
    assert not any(scenes.scene(split, i).has_held_out for split in ("train", "val") for i in range(600))
    assert not any(scenes.crowd(i).has_held_out for i in range(100))
    assert [scene.has_held_out for scene in scenes.test_scenes(50)] == [i % 5 == 0 for i in range(50)]


def test_every_pair_of_attributes_occurs_in_training():
    allowed = set(itertools.product(scenes.SIZES, scenes.COLOURS, scenes.SHAPES)) - HELD_OUT
    for a, b in itertools.combinations(range(3), 2):
        every = {(triple[a], triple[b]) for triple in itertools.product(scenes.SIZES, scenes.COLOURS, scenes.SHAPES)}
        assert {(triple[a], triple[b]) for triple in allowed} == every


def test_one_to_three_objects_alike_often_and_from_left_to_right():
    drawn = [scenes.scene("val", i) for i in range(300)]
    assert Counter(len(scene.things) for scene in drawn) == {1: 100, 2: 100, 3: 100}
    for scene in drawn:
        xs = [thing.x for thing in scene.things]
        assert xs == sorted(xs)
        assert all(0 < thing.x < 1 and 0 < thing.y < 1 for thing in scene.things)


def test_every_object_is_seen_where_it_stands():
    for index in range(100):
        scene = scenes.scene("val", index)
        image, labels = scenes.render_with_labels(scene)
        assert image.size == (96, 96)
        assert image.mode == "RGB"
        assert labels.shape == (24, 24)
        for place, thing in enumerate(scene.things, 1):
            rows, columns = np.nonzero(labels == place)
            assert len(rows) >= 4, f"val {index}: object {place} is hidden"
            assert abs(columns.mean() / 24 - thing.x) < thing.radius


def test_colours_are_drawn_as_named():
    for colour, rgb in (("red", (220, 25, 30)), ("white", (250, 250, 250)), ("blue", (30, 70, 230))):
        pixels = np.asarray(scenes.render(make_scene(("small", colour, "circle"))), float)
        middle = pixels[46:50, 17:21].mean((0, 1))  # the circle's centre is at (0.2, 0.5)
        assert np.abs(middle - rgb).max() < 35


def test_a_larger_rendering_shows_the_same():
    scene = scenes.scene("val", 5)
    small = np.asarray(scenes.render(scene), float)
    large = np.asarray(scenes.render(scene, 384).resize((96, 96)), float)
    assert np.abs(small - large).mean() < 4
    with pytest.raises(ValueError, match="100 is not a multiple of 96"):
        scenes.render(scene, 100)


def test_caption():
    scene = make_scene(("large", "red", "circle"), ("small", "blue", "star"), ("small", "green", "cross"))
    assert scenes.caption(scene) == "a large red circle, a small blue star and a small green cross"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a large red circle and a small blue star", True),
        (" a small blue star and a large red circle.", True),
        ("a large red circle, a small blue star", True),
        ("a large red circle", False),
        ("a large red circle and a small blue star and a small blue star", False),
        ("a large blue circle and a small red star", False),
        ("a small red circle and a small blue star", False),
        ("a large red circle and a small blue cross", False),
        ("a large red circle and a small blue star on a table", False),
        ("", False),
    ],
)
def test_caption_judge(text, right):
    scene = make_scene(("large", "red", "circle"), ("small", "blue", "star"))
    assert scenes.caption_is_right(text, scene) is right


def test_exact_captions_keep_the_order():
    scene = make_scene(("large", "red", "circle"), ("small", "blue", "star"))
    assert scenes.caption_is_exact("a large red circle and a small blue star", scene)
    assert not scenes.caption_is_exact("a small blue star and a large red circle", scene)


@pytest.mark.parametrize(
    ("text", "right"), [("red", True), (" Red. ", True), ("blue", False), ("red red", False), ("", False)]
)
def test_answer_judge(text, right):
    assert scenes.answer_is_right(text, Question("colour", "What colour is the star?", "red")) is right


def described(scene, phrase):
    """The objects that a noun phrase fits, found word by word."""
    words = set(phrase.split()) - {"object"}
    return [thing for thing in scene.things if words <= set(thing.triple)]


def test_questions_about_an_attribute_have_one_right_answer():
    for index in range(200):
        scene = scenes.scene("val", index)
        for question in scenes.questions(scene):
            if question.kind in ("colour", "shape", "size"):
                phrase = question.text.split(" the ")[-1] if " the " in question.text else question.text[7:]
                for word in ("have?", "small or large?", "?"):
                    phrase = phrase.removesuffix(word).strip()
                (thing,) = described(scene, phrase)
                assert question.answer == getattr(thing, question.kind), question


def test_questions_about_existence_count_and_place_are_answered_from_the_scene():
    answers = Counter()
    for index in range(300):
        scene = scenes.scene("val", index)
        by_kind = {question.kind: question for question in scenes.questions(scene)}
        assert by_kind["count"].answer == ("one", "two", "three")[len(scene.things) - 1]
        existence = by_kind["existence"]
        phrase = existence.text.split(" a ", 1)[-1].split(" an ", 1)[-1].removesuffix(" in the picture?").rstrip("?")
        assert existence.answer == ("yes" if described(scene, phrase) else "no"), existence
        answers[existence.answer] += 1
        if "place" in by_kind:
            end = scene.things[0 if "left" in by_kind["place"].text else -1]
            assert by_kind["place"].answer == " ".join(end.triple)
    assert 120 < answers["yes"] < 180


def test_relations_are_answered_from_the_positions():
    answers = Counter()
    for index in range(300):
        scene = scenes.scene("val", index)
        for question in scenes.questions(scene):
            if question.kind == "relation":
                first, second = question.text.removeprefix("Is the ").rstrip("?").split(" of the ")
                subject, side = first.rsplit(" the ", 1)
                (a,), (b,) = described(scene, " ".join(subject.split()[:2])), described(scene, second)
                assert question.answer == ("yes" if (a.x < b.x) == (side == "left") else "no")
                answers[question.answer] += 1
    assert min(answers.values()) > 60


def test_no_question_names_a_whole_triple():
    for index in range(200):
        for question in scenes.questions(scenes.scene("train", index), variant=3):
            assert not any(" ".join(triple) in question.text for triple in HELD_OUT)


def test_other_variants_ask_other_questions():
    scene = scenes.scene("val", 2)
    assert scenes.questions(scene) == scenes.questions(scene)
    assert len({tuple(scenes.questions(scene, variant)) for variant in range(4)}) > 1
