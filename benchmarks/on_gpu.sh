#!/usr/bin/env bash
# Runs benchmarks/on_gpu.py from the checkout, on a machine without a network.
#
#     WHEELS=wheels OUT=results benchmarks/on_gpu.sh [--small] [--only SECTION ...]
#
# WHEELS          a folder of wheels of what is missing there; unpacked to /tmp/on_gpu_site, nothing else changes
# OUT             where gpu-<card>.json and .md go; benchmarks/results by default
# BUDGET_SECONDS  no section begins after this many seconds; 450 by default
# COMMIT          names the commit where there is no .git
# PYTHON          the interpreter; python3 by default
set -euo pipefail
[[ -z ${OUT:-} ]] || OUT=$(mkdir -p "$OUT" && cd "$OUT" && pwd)
[[ -z ${WHEELS:-} ]] || WHEELS=$(cd "$WHEELS" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
site=/tmp/on_gpu_site
export OUT=${OUT:-}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
fi

missing=$("$python" - <<'EOF'
import importlib

names = ["jax", "flax", "numpy", "ml_dtypes", "safetensors", "huggingface_hub"]
names += ["wadler_lindig", "jaxtyping", "tenacity", "tqdm", "fsspec", "filelock"]
missing = []
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append((error.name or name).partition(".")[0])
print(" ".join(name.replace("_", "-") for name in dict.fromkeys(missing)))
EOF
)
if [[ -n $missing ]]; then
    echo "Modules are missing here: bring the wheels of $missing in a folder, and set WHEELS to it." >&2
    exit 2
fi

# JAX and torch share the card: JAX takes this much of it at the start, torch has the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.55}

exec "$python" -m benchmarks.on_gpu "$@"
