"""Ways to generate beside the single call: refilled slots, texts, and the old Python loop as a reference."""

from qwen2_core.requests import SequenceRequest
from qwen2_engine.continuous_batching import ContinuousEngine, RunningSlots
from qwen2_engine.memory_plan import Stage
from qwen2_engine.prompt_reading import Occupancy, PromptReader
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_engine.text import GeneratedText, generate_text

__all__ = [
    "ContinuousEngine",
    "GeneratedText",
    "Occupancy",
    "PromptReader",
    "RunningSlots",
    "SequenceRequest",
    "Stage",
    "generate_single_task_python",
    "generate_text",
]
