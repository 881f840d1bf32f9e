"""The workers of a run on Ray as the driver sees them, with a cluster that is none."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed")

import ray.exceptions

from arc_runner.cluster import ray_actor, ray_crew
from arc_runner.cluster.ray_actor import use_own_chips
from arc_runner.cluster.ray_crew import MOST_STARTS, Crew, Lost
from arc_runner.cluster.ray_messages import Order, Status
from arc_runner.cluster.ray_places import Place, find_kind, find_places
from arc_runner.errors import ClusterError


def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerHostname": f"host-{name}", "Alive": alive, "Resources": resources}


# --- Places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "kind"),
    [
        ([node("a", CPU=8), node("b", CPU=8, GPU=1)], "GPU"),
        ([node("a", CPU=8, GPU=1), node("b", CPU=8, TPU=4)], "TPU"),
        ([node("a", CPU=8), node("b", alive=False, GPU=1)], "CPU"),
        ([node("a", CPU=0)], None),
        ([], None),
    ],
)
def test_workers_run_on_the_best_that_the_cluster_has(nodes: list[dict[str, Any]], kind: str | None):
    assert find_kind(nodes) == kind


def test_there_is_one_place_for_each_gpu_and_one_for_all_chips_of_a_tpu_host():
    gpus = find_places([node("a", CPU=8, GPU=2), node("b", CPU=8), node("c", GPU=1)], "GPU", None)
    assert [str(one) for one in gpus] == ["host-a GPU 0", "host-a GPU 1", "host-c GPU 0"]
    assert gpus[0].options() == {"num_cpus": 0, "num_gpus": 1}
    (tpu,) = find_places([node("a", TPU=4), node("b", CPU=1)], "TPU", None)
    assert str(tpu) == "host-a TPU"
    assert tpu.options() == {"num_cpus": 0, "resources": {"TPU": 4}}


def test_on_cpus_there_is_one_place_a_machine_or_as_many_as_are_asked_for():
    nodes = [node("a", CPU=2), node("b", CPU=3), node("c", CPU=0)]
    assert [one.node for one in find_places(nodes, "CPU", None)] == ["a", "b"]
    assert [one.node for one in find_places(nodes, "CPU", 3)] == ["a", "b", "a"]
    assert [one.node for one in find_places(nodes, "CPU", 100)] == ["a", "b", "a", "b", "b"]
    assert find_places(nodes, "CPU", 1)[0].options() == {"num_cpus": 1}


@pytest.mark.parametrize(("chips", "bounds"), [(1, "1,1,1"), (4, "2,2,1"), (8, "2,4,1")])
def test_a_host_of_a_slice_uses_its_own_chips_alone(monkeypatch: pytest.MonkeyPatch, chips: int, bounds: str):
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_ID": "3"})
    use_own_chips(chips)
    assert os.environ["TPU_PROCESS_BOUNDS"] == "1,1,1"
    assert os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] == bounds
    assert os.environ["TPU_VISIBLE_CHIPS"].count(",") == chips - 1


# --- Workers ------------------------------------------------------------------------------------------------


class FakeRay:
    """Ray as far as a crew uses it. An answer is what is to be returned or raised."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self.there = list(nodes)
        self.exceptions = ray.exceptions
        affinity = SimpleNamespace(
            NodeAffinitySchedulingStrategy=lambda node, soft: SimpleNamespace(node=node, soft=soft)
        )
        self.util = SimpleNamespace(scheduling_strategies=affinity)
        self.started: list[tuple[str, int]] = []  # node and host index
        self.killed: list[int] = []
        self.answers: dict[int, Any] = {}  # by host index
        self.later: list[Exception] = []  # what those raise that are asked once more

    def nodes(self) -> list[dict[str, Any]]:
        return self.there

    def put(self, value: Any) -> Any:
        return value

    def remote(self, _cls: type) -> Any:
        return SimpleNamespace(options=self._options)

    def _options(self, scheduling_strategy: Any, **options: Any) -> Any:
        assert not scheduling_strategy.soft
        assert options["max_restarts"] == 0  # Ray starts none again: it would write to the same folder

        def start(_assignment: Any, index: int, _chips: int) -> Any:
            self.started.append((scheduling_strategy.node, index))
            return SimpleNamespace(index=index, exchange=SimpleNamespace(remote=lambda _order: index))

        return SimpleNamespace(remote=start)

    def wait(self, answers: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        del num_returns
        ready = [one for one in answers if self.answers.get(one) is not None]
        if not ready:
            time.sleep(min(timeout, 0.01))
        return ready, []

    def get(self, index: int, timeout: float | None = None) -> Any:
        if timeout is not None and self.later:
            raise self.later.pop(0)
        answer = self.answers.pop(index)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.index)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_crew, "_LOOKED_SECONDS", 0.0)
    monkeypatch.setattr(ray_crew, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(ray_crew, "_CAUSE_SECONDS", 0.2)


def crew_of(fake: FakeRay, most: int | None = None, in_use: tuple[int, ...] = ()) -> Crew:
    assignment: Any = None
    module: Any = fake
    return Crew(module, assignment, most, in_use.__contains__)


def hear(crew: Crew) -> list[Any]:
    return [heard for _, heard in crew.hear(0.01)]


def status(made: int = 0, **fields: Any) -> Status:
    return Status("generating", figures={"sequences_made": made}, **fields)


def test_each_worker_writes_to_a_host_folder_that_nobody_has_had():
    fake = FakeRay(node("a", CPU=1), node("b", CPU=1))
    crew = crew_of(fake, in_use=(2,))
    crew.hire()
    assert fake.started == [("a", 1), ("b", 3)]
    fake.answers[1] = ray.exceptions.ActorDiedError()
    (lost,) = hear(crew)
    assert isinstance(lost, Lost)
    assert lost.blames
    crew.hire()
    assert fake.started[2:] == [("a", 4)]
    assert fake.killed == [1]


def test_a_node_that_comes_gets_a_worker_and_one_that_is_gone_does_not():
    fake = FakeRay(node("a", CPU=1))
    crew = crew_of(fake)
    crew.hire()
    fake.there.append(node("b", CPU=1))
    crew.hire()
    assert fake.started == [("a", 1), ("b", 2)]
    fake.there[0] = node("a", alive=False, CPU=1)
    fake.answers[1] = ray.exceptions.ActorDiedError()
    (lost,) = hear(crew)
    assert lost == Lost("its node is gone", blames=False)
    crew.hire()
    assert len(fake.started) == 2


def test_there_are_no_more_workers_than_asked_for():
    fake = FakeRay(node("a", CPU=4))
    crew = crew_of(fake, most=3)
    crew.hire()
    fake.there.append(node("b", CPU=4))
    crew.hire()
    assert [name for name, _ in fake.started] == ["a", "a", "a"]


def test_a_place_whose_workers_always_end_is_given_up_and_the_reason_is_told():
    fake = FakeRay(node("a", CPU=1))
    crew = crew_of(fake)
    for index in range(1, MOST_STARTS + 1):
        crew.hire()
        fake.answers[index] = status(failure="there is no model here")
        assert hear(crew) == [Lost("there is no model here", blames=False)]
    with pytest.raises(
        ClusterError, match=r"no worker is left: worker 5 \(host-a CPU 0\): there is no model here"
    ):
        crew.hire()


def test_a_place_whose_workers_store_something_in_between_is_not_given_up():
    fake = FakeRay(node("a", CPU=1))
    crew = crew_of(fake)
    for index in range(1, 3 * MOST_STARTS):
        crew.hire()
        for made in (0, 1):
            fake.answers[index] = status(made)
            hear(crew)
            crew.order(crew.members[index], Order())
        fake.answers[index] = ray.exceptions.ActorDiedError()
        hear(crew)
    crew.hire()
    assert len(fake.started) == 3 * MOST_STARTS


def test_a_worker_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_crew, "SILENT_SECONDS", 0.05)
    fake = FakeRay(node("a", CPU=1))
    crew = crew_of(fake)
    crew.hire()
    fake.answers[1] = status()
    hear(crew)
    crew.order(crew.members[1], Order())
    time.sleep(0.1)
    (lost,) = hear(crew)
    assert isinstance(lost, Lost)
    assert "has not answered" in lost.reason
    assert fake.killed == [1]
    crew.hire()
    assert fake.started == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("nodes", "why"),
    [([node("a", CPU=0)], "it has no CPU, GPU or TPU to give"), ([node("a", GPU=1)], "are in use")],
)
def test_a_cluster_that_starts_no_worker_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], why: str
):
    crew = crew_of(FakeRay(*nodes))
    crew.hire()
    monkeypatch.setattr(ray_crew, "NOBODY_SECONDS", 0.0)
    with pytest.raises(ClusterError, match=f"has started no worker for 0 s: .*{why}"):
        crew.hire()


def unreached() -> Exception:
    return ray.exceptions.ActorUnavailableError("socket closed", None)


@pytest.mark.parametrize(
    ("later", "lost"),
    [
        (
            [unreached(), ray.exceptions.ActorDiedError()],
            "The actor died unexpectedly before finishing this task.",
        ),
        ([unreached() for _ in range(100)], "it cannot be reached"),
        ([ray.exceptions.GetTimeoutError()], "it cannot be reached"),
    ],
)
def test_of_a_worker_that_cannot_be_reached_the_cause_is_waited_for(later: list[Exception], lost: str):
    fake = FakeRay(node("a", CPU=1))
    crew = crew_of(fake)
    crew.hire()
    fake.answers[1], fake.later = unreached(), later
    assert hear(crew) == [Lost(lost, blames=lost.startswith("The actor died"))]


def test_a_missing_module_is_told_in_a_sentence():
    fake = FakeRay(node("a", CPU=1))
    crew = crew_of(fake)
    crew.hire()
    error = ray.exceptions.RayError("Traceback\nModuleNotFoundError: No module named 'arc_runner'\nmore")
    fake.answers[1] = error
    (lost,) = hear(crew)
    assert lost == Lost(
        "ModuleNotFoundError: No module named 'arc_runner'; install this package and ray on all nodes", False
    )


def test_a_place_says_where_it_is():
    assert str(Place("id", "name", "CPU", 1, 2)) == "name CPU 2"


def test_an_actor_tells_rays_metrics_what_it_tells_the_driver(monkeypatch: pytest.MonkeyPatch):
    told: dict[str, float] = {}

    class Metric:
        def __init__(self, name: str, _about: str, tag_keys: tuple[str, ...]) -> None:
            assert tag_keys == ("host",)
            self._name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags == {"host": "3"}

        def set(self, value: float) -> None:
            told[self._name] = value

        def inc(self, value: float) -> None:
            told[self._name] = told.get(self._name, 0) + value

    ended: list[Any] = [None, None]
    statuses = iter([status(tokens=5), status(tokens=9, slots=8, slots_in_use=7, ended=ended)])
    monkeypatch.setattr(ray_actor, "Gauge", Metric)
    monkeypatch.setattr(ray_actor, "Counter", Metric)
    monkeypatch.setattr(ray_actor.Worker, "__init__", lambda *_: None)
    monkeypatch.setattr(ray_actor.Worker, "exchange", lambda *_: next(statuses))
    assignment: Any = None
    actor = ray_actor.WorkerActor(assignment, 3, 0)
    actor.exchange(Order())
    actor.exchange(Order())
    assert told == {
        "qwen2_tokens_per_second": 0.0,
        "qwen2_slots": 8,
        "qwen2_slots_in_use": 7,
        "qwen2_tokens": 9,
        "qwen2_sequences": 2,
    }
