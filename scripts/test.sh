#!/usr/bin/env bash
# Sets up .venv, then lints and runs the tests; arguments go to pytest. Works from any directory.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ruff check .
ruff format --check .
exec python -m pytest "$@"
