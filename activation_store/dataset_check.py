"""Comparing a store with a data set: what is missing, and what was made of other prompts than it has now."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from activation_store.format import SequenceId, SequenceRecord, StoreSettings, sequence_key
from activation_store.index import SequenceIndex
from activation_store.reader import ActivationStore


def verify_coverage(store: ActivationStore, expected: Collection[tuple[str, int]]) -> Iterator[str]:
    """Yields findings about puzzles that the store has no, or too few, sequences of.

    A sequence that is there of two prompts counts once. Puzzles that are not expected are no finding: a store
    may hold several data sets.

    Args:
        store: each (task_id, test_index) in it should have as many sequences as the others.
        expected: the (task_id, test_index) of each puzzle that the store should cover.
    """
    found = Counter((task_id, test) for task_id, test, *_ in set(map(_name, store.index.records())))
    wanted = set(expected)
    most = max((count for puzzle, count in found.items() if puzzle in wanted), default=0)
    for task_id, test in sorted(wanted):
        count = found[task_id, test]
        if count == 0:
            yield f"task {task_id} test {test} has no sequence"
        elif count < most:
            yield f"task {task_id} test {test} has {count} sequences, others have {most}"


def verify_prompts(store: ActivationStore) -> Iterator[str]:
    """Yields findings about sequences that are there of two prompts; one is not of the data set any more."""
    names = Counter(map(_name, store.index.records()))
    twice = Counter(task_id for (task_id, *_), count in names.items() if count > 1)
    for task_id, count in sorted(twice.items()):
        yield (
            f"task {task_id}: {count} sequences are there of two prompts; give --model_path to learn which "
            "are not of the data set any more"
        )


def stale_sequences(
    index: SequenceIndex, settings: StoreSettings, now: Mapping[str, SequenceId]
) -> list[SequenceRecord]:
    """Returns the sequences of a store that were made of other prompts than their tasks have now.

    A sequence is compared with those of `now` that have its task, test and augmentation. One whose task is
    not there is not stale, and one whose task is there without its test is.

    Args:
        index: the sequences of the store.
        settings: the store's.
        now: sequences with the prompts of now, by their keys.
    """
    if all(key in now for key in index):
        return []
    prompts = {(one.task_id, one.test_index, one.augmentation): one.prompt_token_ids for one in now.values()}
    tests = {(task_id, test) for task_id, test, _ in prompts}
    tasks = {task_id for task_id, _ in tests}

    def is_stale(record: SequenceRecord) -> bool:
        if record.key in now or record.task_id not in tasks:
            return False
        if (record.task_id, record.test_index) not in tests:
            return True
        prompt = prompts.get((record.task_id, record.test_index, record.augmentation))
        return prompt is not None and sequence_key(settings, record.identity(prompt)) != record.key

    return [record for record in index.records() if is_stale(record)]


def _name(record: SequenceRecord) -> tuple[str, int, str, int, tuple[float, ...]]:
    return record.task_id, record.test_index, record.augmentation, record.sample_index, record.strengths
