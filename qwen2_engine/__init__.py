"""Ways to generate beside the single call: refilled slots, and the old Python loop as a reference."""

from qwen2_core.requests import SequenceRequest
from qwen2_engine.continuous_batching import ContinuousEngine, Occupancy, RunningSlots
from qwen2_engine.python_loop import generate_single_task_python

__all__ = ["ContinuousEngine", "Occupancy", "RunningSlots", "SequenceRequest", "generate_single_task_python"]
