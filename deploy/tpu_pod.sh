#!/usr/bin/env bash
# Runs the main job on every host of a TPU pod, the same command on each; see deploy/README.md.
#
#   TPU_NAME=my-pod ZONE=us-central2-b BUCKET=gs://my-bucket/run deploy/tpu_pod.sh [flags of the main job]
#
# The checkout on the hosts is ~/qwen2-jax-activations. The exit code is that of the hosts: 75 if one was
# stopped, when the same command continues.
set -euo pipefail

: "${TPU_NAME:?name of the TPU VM}" "${ZONE:?its zone}" "${BUCKET:?gs:// URL of the store, shared by all hosts}"

flags=$(printf ' %q' --activations_dir "$BUCKET" "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
    --command="cd ~/qwen2-jax-activations && . .venv/bin/activate && exec python distributed_kv_cached_inference.py$flags"
