"""A task: what it is read from, what it shows, and its augmentations."""

import json
from typing import Any

import pytest
from puzzle_cases import GOOD, GOOD_TASK, without_test_outputs

from arc_puzzles.augmentations import Augmentation, choose_augmentations
from arc_puzzles.grids import ArcFormatError
from arc_puzzles.tasks import ArcTask, Pair, count_tests, is_meant_as_task, is_pairs, parse_task

# --- Reading ------------------------------------------------------------------------------------------------


def parsed(task: Any) -> ArcTask:
    return parse_task("t", json.loads(json.dumps(task)))


@pytest.mark.parametrize("output", [None, [], [[]]])
def test_a_tests_output_that_is_null_or_empty_is_not_known(output: object):
    task = parsed({**GOOD, "test": [{"input": [[1]], "output": output}, {"input": [[2]], "output": [[3]]}]})
    assert task.test == (Pair(((1,),), None), Pair(((2,),), ((3,),)))
    assert task.outputs == (None, ((3,),))


def test_what_a_task_has_besides_its_pairs_is_ignored():
    pair = {"input": [[1]], "output": [[2]], "id": 7, "reasoning": "because"}
    task = parsed({"name": "x", "source": "y", "train": [pair], "test": [pair], "meta": {"train": 3}})
    assert task == ArcTask("t", (Pair(((1,),), ((2,),)),), (Pair(((1,),), ((2,),)),))


def pairs(n: int) -> list[dict[str, Any]]:
    return [{"input": [[i % 10]], "output": [[i % 10, 1]]} for i in range(n)]


@pytest.mark.parametrize(("n", "train"), [(2, 1), (3, 2), (4, 3), (1000, 3)])
def test_of_a_list_of_pairs_the_first_three_are_train_pairs_and_the_next_is_the_test(n: int, train: int):
    task = parsed(pairs(n))
    assert [pair.input for pair in task.train] == [((i,),) for i in range(train)]
    assert task.test == (Pair(((train,),), ((train, 1),)),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pairs(1), "the task is a list of one pair; it needs one to show the rule and one to test"),
        ([{"input": [[1]]}, *pairs(2)], 'train[0] has no "output"'),
        ([*pairs(1), {"input": "1", "output": [[1]]}], "test[0].input is a text, not a list of rows"),
        (
            {**GOOD, "train": [{"input": ["12"], "output": [[1]]}]},
            "train[0].input row 0 is a text, not a list",
        ),
        ({**GOOD, "train": [{"input": [[1.0]], "output": [[1]]}]}, "column 0 is a float, not an integer"),
        ({**GOOD, "train": [{"input": [[True]], "output": [[1]]}]}, "column 0 is a boolean, not an integer"),
        ({**GOOD, "train": [{"input": [["1"]], "output": [[1]]}]}, "column 0 is a text, not an integer"),
        ({**GOOD, "train": [{"input": [[10]], "output": [[1]]}]}, "is not a colour from 0 to 9"),
        ({**GOOD, "train": [{"input": [[-1]], "output": [[1]]}]}, "is not a colour from 0 to 9"),
        (
            {**GOOD, "train": [{"input": [[1] * 31], "output": [[1]]}]},
            "row 0 has 31 cells; a row has 1 to 30",
        ),
        ({**GOOD, "train": [{"input": [[1]] * 31, "output": [[1]]}]}, "has 31 rows; a grid has 1 to 30"),
        ({**GOOD, "test": [{"input": [[1]], "output": [[1], []]}]}, "test[0].output row 1 has 0 cells"),
        ({**GOOD, "test": [{"input": [[1]], "output": ""}]}, "test[0].output is a text, not a list of rows"),
        ({**GOOD, "test": [{"input": [], "output": None}]}, "test[0].input has 0 rows"),
    ],
)
def test_a_malformed_task_is_refused_with_the_place_and_the_reason(content: Any, reason: str):
    with pytest.raises(ArcFormatError) as refused:
        parsed(content)
    assert reason in str(refused.value)


HOSTILE_IDS = [
    "\ud800",
    "\x1b[31mred",
    "a\0",
    "a\u202eb",
    "\u0430bc",
    "a\uff0fb",
    "",
    "..",
    "a/../b",
    "\n",
    "x" * 10**5,
]


@pytest.mark.parametrize("task_id", HOSTILE_IDS, ids=range(len(HOSTILE_IDS)))
def test_a_hostile_id_is_refused_in_a_sentence_that_can_be_printed(task_id: str):
    with pytest.raises(ArcFormatError, match="is not safe as a file name") as refused:
        parse_task(task_id, GOOD)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


def test_what_is_meant_as_a_task_is_told_from_other_json():
    for task in ({"train": 1}, {"test": []}, GOOD, pairs(1)):
        assert is_meant_as_task(task)
    for other in ({}, {"splits": {"train": 1}}, [], [1], [[1]], [GOOD], "train", None, 3, {"input": [[1]]}):
        assert not is_meant_as_task(other)
    assert is_pairs(pairs(2))
    assert not is_pairs([*pairs(2), 1])


def test_the_tests_of_a_malformed_task_are_counted_where_they_can_be_seen():
    assert count_tests({"train": 1, "test": [1, 2, 3]}) == 3
    for content in ({"test": []}, {"test": 7}, {}, [], None, pairs(5)):
        assert count_tests(content) == 1


def test_a_tasks_digest_is_of_what_it_shows():
    shown = GOOD_TASK.digest
    assert len(shown) == 16
    assert parse_task("other-name", GOOD).digest == shown
    assert without_test_outputs(GOOD_TASK).digest == shown
    assert parsed({**GOOD, "test": [{"input": [[3, 5]]}, {"input": [[5]]}]}).digest != shown
    assert parsed({**GOOD, "train": [{"input": [[1, 2]], "output": [[2, 2]]}]}).digest != shown


# --- Augmented tasks ----------------------------------------------------------------------------------------


def test_augmenting_a_task_augments_every_grid_and_the_inverse_restores_it():
    augmentation = Augmentation.parse("rot90/c0213456789")
    augmented = GOOD_TASK.augmented(augmentation)
    assert augmented == ArcTask(
        "good",
        train=(Pair(((2,), (1,)), ((1,), (2,))),),
        test=(Pair(((3,), (4,)), ((4,), (3,))), Pair(((5,),), None)),
    )
    for augmentation in choose_augmentations(20, seed=1):
        assert GOOD_TASK.augmented(augmentation).augmented(augmentation.inverse()) == GOOD_TASK
