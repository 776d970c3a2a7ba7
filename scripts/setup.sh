# Sourced by the other scripts: creates .venv with yopo and the tested versions of its dependencies.
# Needs Python 3.11+ with pip; does nothing until the dependencies change. CONSTRAINTS names another
# list of versions than scripts/constraints.txt, from the root.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "yopo needs Python 3.11 or newer, found $("$python" --version). Set PYTHON to a newer one." >&2
    exit 1
}
constraints="${CONSTRAINTS:-scripts/constraints.txt}"
wanted="$(cat pyproject.toml "$constraints" | cksum) $root"
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.yopo-setup 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up .venv ..." >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # Install torch first, pinned: a looser requirement would fetch gigabytes of another build.
    .venv/bin/python -m pip install --quiet "$(grep '^torch==' "$constraints")" >&2
    .venv/bin/python -m pip install --quiet --constraint "$constraints" --editable '.[test,pictures]' >&2
    echo "$wanted" > .venv/.yopo-setup
fi
export PATH="$root/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false
