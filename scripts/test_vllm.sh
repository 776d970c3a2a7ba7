#!/usr/bin/env bash
# Sets up .venv-vllm, with vLLM's CPU build, and runs the tests of the vLLM plugin; arguments go to
# pytest. Works from any directory. Exit code 77: skipped, as the packages could not be had.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
python="${PYTHON:-python3}"
environment="$root/.venv-vllm"
list="scripts/vllm-constraints.txt"

skip() {
    echo "SKIPPED, not passed: the vLLM tests did not run, as $1." >&2
    exit 77
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "vLLM's CPU build is for Linux on x86-64 only"
wanted="$(cat pyproject.toml "$list" "${BASH_SOURCE[0]}" | cksum) $root"
if [ "$(cat "$environment/.yopo-setup" 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up .venv-vllm: about 3 GB, some minutes ..." >&2
    [ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
    pip=("$environment/bin/python" -m pip install --quiet)
    # Torch with its own dependencies, first: what follows is complete, and wants no other build.
    "${pip[@]}" --constraint "$list" "$(grep '^torch==' "$list")" >&2 || skip "torch cannot be had"
    "${pip[@]}" --no-deps --requirement "$list" >&2 || skip "vLLM's packages cannot be had"
    "${pip[@]}" --no-deps --editable . >&2
    # vLLM's models import torchvision, whose compiled operators do not fit the CPU build of torch.
    sed -i 's/^@torch.library.register_fake("torchvision::/# &/' \
        "$environment"/lib/python3*/site-packages/torchvision/_meta_registrations.py
    echo "$wanted" > "$environment/.yopo-setup"
fi
export PATH="$environment/bin:$PATH"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest tests/serving/vllm_plugin "$@"
