"""What a file says of its input and tasks: seen where nobody states it, stated where shapes do not tell."""

import json

import pytest
import torch

from cut.facts import KINDS, facts_of
from cut.predict import checked

EXAMPLE = torch.zeros(2, 3, 24, 32)
OUTPUTS = {
    "seg": torch.zeros(2, 5, 24, 32),
    "normal": torch.zeros(2, 3, 12, 16),
    "depth": torch.zeros(2, 1, 24, 32),
    "scene": torch.zeros(2, 4),
    "age": torch.zeros(2, 1),
    "score": torch.zeros(2),
}


def test_facts_that_are_seen_are_enough_for_a_prediction():
    found = facts_of(EXAMPLE, OUTPUTS)
    assert checked(json.loads(json.dumps(found)), "here") == found
    assert found["input"] == {"height": 24, "width": 32, "mean": [0.0] * 3, "std": [1.0] * 3}
    kinds = {t: f["kind"] for t, f in found["tasks"].items()}
    assert kinds == {
        "seg": "segmentation",
        "normal": "segmentation",
        "depth": "map",
        "scene": "classification",
        "age": "numbers",
        "score": "numbers",
    }
    assert {t: f["channels"] for t, f in found["tasks"].items()} == {
        t: o.shape[1] if o.ndim > 1 else 1 for t, o in OUTPUTS.items()
    }


def test_what_is_told_goes_before_what_is_seen_and_the_rest_stays():
    told = {"input": {"mean": [0.1, 0.2, 0.3]}, "tasks": {"normal": {"kind": "normals"}, "other": {"unit": "m"}}}
    found = facts_of(EXAMPLE, OUTPUTS, told, mean=[0.5] * 3, std=[0.25] * 3)
    assert found["input"]["mean"] == [0.1, 0.2, 0.3] and found["input"]["std"] == [0.25] * 3
    assert found["tasks"]["normal"]["kind"] == "normals" and set(found["tasks"]) == set(OUTPUTS)
    assert {t: f for t, f in found["tasks"].items() if t != "normal"} == {
        t: f for t, f in facts_of(EXAMPLE, OUTPUTS)["tasks"].items() if t != "normal"
    }
    assert facts_of(EXAMPLE, OUTPUTS, found) == found


def test_an_input_that_is_no_picture_has_facts_on_its_tasks_only():
    assert set(facts_of(torch.zeros(2, 7), OUTPUTS)) == {"tasks"}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (3, "facts are int; allowed: a dict with input, tasks"),
        ({"size": 3}, "facts have 'size'; allowed: input, tasks"),
        ({"input": {"hight": 3}}, "'hight'; allowed: height, width, mean, std"),
        ({"input": {"height": 25}}, "height 25; allowed: 24"),
        ({"input": {"mean": [0.5]}}, "mean .*; allowed: 3 numbers"),
        ({"input": {"mean": "grey"}}, "mean 'grey'; allowed: 3 numbers"),
        ({"input": {"std": [1, 1, 0]}}, "std .*; allowed: 3 numbers above 0"),
        ({"tasks": ["seg"]}, "tasks are list"),
        ({"tasks": {"seg": "classes"}}, "'seg' are str"),
        ({"tasks": {"seg": {"colour": 1}}}, "'colour'; allowed: kind, channels, unit, classes"),
        ({"tasks": {"seg": {"kind": "edges"}}}, f"'edges'; allowed: {', '.join(KINDS)}"),
        ({"tasks": {"seg": {"kind": "depth"}}}, r"\[2, 5, 24, 32\]: segmentation, numbers"),
        ({"tasks": {"scene": {"kind": "map"}}}, r"\[2, 4\]: classification, numbers"),
        ({"tasks": {"seg": {"classes": 5}}}, "classes 5; allowed: a list of names"),
        ({"tasks": {"depth": {"unit": 1}}}, "unit 1; allowed: a text"),
    ],
)
def test_facts_of_another_form_are_refused(told, message):
    with pytest.raises(ValueError, match=message):
        facts_of(EXAMPLE, OUTPUTS, told)
