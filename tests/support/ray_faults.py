"""The runner on Ray with workers that do what files in the run's folder say, for tests.

As each window begins, a worker leaves its process id in `window-INDEX`. Then it waits as long as there is a
file `hold` or `hold-INDEX`, sleeps for the seconds in `pause` or `pause-INDEX`, and kills itself if a
sequence of the task that `poison` names is in a slot.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from arc_runner.cluster import ray_actor
from arc_runner.cluster.ray_messages import Assignment
from qwen2_engine.continuous_batching import RunningSlots

# For `python -c`; no torch: transformers would import it, which takes longer than all else.
SCRIPT = "import sys; sys.modules['torch'] = None; import ray_faults; ray_faults.main()"


class FaultyActor(ray_actor.WorkerActor):
    def __init__(self, assignment: Assignment, index: int, tpu_chips: int) -> None:
        folder = Path(assignment.options.output_filepath).parent
        dispatch = RunningSlots._dispatch

        def read(name: str) -> str:
            for file in (folder / f"{name}-{index}", folder / name):
                try:
                    return file.read_text()
                except FileNotFoundError:
                    continue
            return ""

        def faulty(self: RunningSlots) -> Any:
            temporary = folder / f".window-{index}"
            temporary.write_text(str(os.getpid()))
            temporary.replace(folder / f"window-{index}")
            while read("hold"):
                time.sleep(0.02)
            time.sleep(float(read("pause") or 0))
            poison = read("poison")
            if any(one and one.request.id.task_id == poison for one in self._running):
                os.kill(os.getpid(), signal.SIGKILL)
            return dispatch(self)

        RunningSlots._dispatch = faulty
        super().__init__(assignment, index, tpu_chips)


def main() -> None:
    ray_actor.WorkerActor = FaultyActor
    sys.argv[0] = "distributed_kv_cached_inference.py"
    runpy.run_module("distributed_kv_cached_inference", run_name="__main__")
