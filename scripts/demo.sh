#!/usr/bin/env bash
# Runs the main workflow on the bundled demo model: calibrate, inspect, apply, evaluate. Works from a
# fresh clone and from any directory, and can be repeated. Writes to demo-output/ (or $1).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

out="${1:-$root/demo-output}"
budget="${BUDGET:-0.12}"
mkdir -p "$out"
echo "== calibrate: one pass over the bundled pairs, a plan at a visual budget of $budget" >&2
yopo calibrate --model llava-tiny --data demo:calibration --budget "$budget" \
    -o "$out/plan.yaml" --stats "$out/statistics.safetensors" --force
echo "== inspect" >&2
yopo inspect "$out/plan.yaml"
echo "== apply: bake the plan into a checkpoint and check it" >&2
yopo apply "$out/plan.yaml" -o "$out/llava-tiny-yopo" --verify --force
echo "== evaluate: dense against pruned, on pairs that calibration never saw" >&2
yopo eval "$out/llava-tiny-yopo" --data demo:heldout --samples 512 --batch-size 32 \
    -o "$out/evaluation.json" --force
echo "== report: all of it on one page" >&2
yopo report "$out/llava-tiny-yopo" --eval "$out/evaluation.json" -o "$out/report.html" --force
