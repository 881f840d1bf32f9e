"""The suite runs on the CPU unless JAX_PLATFORMS says otherwise, from a checkout as well as installed."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; a wrong path must not ask the hub

if importlib.util.find_spec("qwen2_jax") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
