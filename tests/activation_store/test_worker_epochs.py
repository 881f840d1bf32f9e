"""Workers agree on the number of an iteration, and learn of a place that was set while they ran."""

import copy
import gc
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from activation_store import StoreError
from activation_store.worker_epochs import WorkerEpochs, _shared


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def worker(epochs: WorkerEpochs) -> WorkerEpochs:
    """What a process that is started now gets."""
    return _shared(epochs._folder, epochs._round)


def test_workers_of_one_iteration_get_one_number_and_the_next_iteration_the_next():
    main = WorkerEpochs()
    one, two, other = (worker(main) for _ in range(3))
    assert [one.claim("a", follow=False), two.claim("a", follow=False)] == [(None, 0), (None, 0)]
    # Two loaders at once, whose workers come in turns.
    assert [one.claim("b", False)[1], other.claim("c", False)[1], two.claim("b", False)[1]] == [1, 2, 1]
    assert worker(main).claim("c", False)[1] == 2
    assert worker(main).claim("a", False)[1] == 0


def test_a_place_that_was_set_begins_a_new_count():
    main = WorkerEpochs()
    persistent = worker(main)
    assert persistent.claim("a", follow=False) == (None, 0)
    place: dict[str, Any] = {"epoch": 3, "pool": 0, "row": 7, "stop": None}
    main.begin({"epoch": 9})
    main.begin(place)
    assert persistent.claim("b", follow=True) == (place, 0)
    assert persistent.claim("c", follow=True) == (None, 1)
    assert worker(main).claim("b", follow=False) == (None, 0)


def test_a_copy_counts_for_itself(temporary: Path):
    main = WorkerEpochs()
    main.claim("a", follow=False)
    for other in (copy.deepcopy(main), pickle.loads(pickle.dumps(main))):
        assert other.claim("b", follow=False) == (None, 0)
        other.begin({})
    assert main.claim("b", follow=True) == (None, 1)


def test_nothing_is_left_behind(temporary: Path):
    main = WorkerEpochs()
    main.begin({"epoch": 1})
    copied = worker(main)
    del copied
    gc.collect()
    assert len(list(temporary.iterdir())) == 1
    del main
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_a_folder_that_was_removed_is_one_sentence(temporary: Path):
    main = WorkerEpochs()
    for folder in temporary.iterdir():
        shutil.rmtree(folder)
    main.begin({"epoch": 1})  # as when Python ends
    with pytest.raises(StoreError, match="was removed; set TMPDIR to a folder that stays"):
        main.claim("a", follow=False)
