"""Comparing a store with a data set: what is missing, and what was made of other prompts than it has now."""

from collections import Counter
from collections.abc import Collection, Iterator

from activation_store.reader import ActivationStore


def verify_coverage(
    store: ActivationStore, expected: Collection[tuple[str, int]], where: str
) -> Iterator[str]:
    """Yields findings about puzzles that the store has no, or too few, sequences of, or should not have.

    Args:
        store: each (task_id, test_index) in it should have as many sequences as the others.
        expected: the (task_id, test_index) of each puzzle that the store should cover.
        where: what these were taken from, for messages.
    """
    found = Counter((record.task_id, record.test_index) for record in store.index.records())
    most = max(found.values(), default=0)
    wanted = set(expected)
    for task_id, test in sorted(wanted | set(found)):
        count = found[task_id, test]
        if (task_id, test) not in wanted:
            yield f"task {task_id} test {test} is not in {where}"
        elif count == 0:
            yield f"task {task_id} test {test} has no sequence"
        elif count < most:
            yield f"task {task_id} test {test} has {count} sequences, others have {most}"
