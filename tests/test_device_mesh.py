"""Meshes of devices: ``eight_devices.py``, in a process that has eight."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_generation_on_eight_devices():
    tests = Path(__file__).with_name("eight_devices.py")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-20000:]
    assert re.search(r"\b\d\d passed in", done.stdout), done.stdout
    assert "skipped" not in done.stdout
