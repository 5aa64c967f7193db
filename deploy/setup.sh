#!/bin/sh
# Sets up .venv with the versions of deploy/constraints.txt. Called by make when needed.
#   setup.sh [PYTHON]
set -eu
python=${1:-python3}

. deploy/venv.sh
make_venv .venv "$python"

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

echo "setup: installing into .venv (about 2 minutes the first time)"
# torch goes first, in its exact version, which then satisfies every other requirement.
pip install -c deploy/constraints.txt torch==2.13.0
pip install -c deploy/constraints.txt -e '.[trainer,web,dev]'

# The tests of the web page need a browser and are skipped without one.
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && can_install; then
    echo "setup: installing chromium for the tests of the web page, if available"
    { apt-get update -qq >/dev/null 2>&1 && apt_install chromium; } || true
fi

# pillow-simd decodes and resizes up to twice as fast. It has no wheels, and it overwrites the PIL folder of pillow, which
# stays installed because other packages require it by name.
simd=12.1.1.post0
if pip show pillow-simd >/dev/null 2>&1; then
    exit 0
fi
can_compile() {
    command -v cc >/dev/null &&
        printf '#include <stdio.h>\n#include <Python.h>\n#include <jpeglib.h>\n#include <zlib.h>\n#include <webp/decode.h>\n' |
        cc -E -I"$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')" - >/dev/null 2>&1
}
avx2() { grep -q avx2 /proc/cpuinfo 2>/dev/null; }
if avx2 && ! can_compile && can_install; then
    echo "setup: installing a compiler and the headers of libjpeg, zlib and libwebp for pillow-simd"
    apt-get update -qq || true
    apt_install gcc libc6-dev libjpeg-dev zlib1g-dev libwebp-dev || true
    # Headers of the distribution's Python. Other builds of Python include them.
    apt_install python3-dev || true
fi
if can_compile && avx2; then
    echo "setup: building pillow-simd"
    if CC="cc -mavx2" pip install --no-binary pillow-simd --force-reinstall --no-deps "pillow-simd==$simd"; then
        exit 0
    fi
fi
echo "setup: NOTICE: using plain pillow (no compiler, headers or AVX2): decoding is up to 2 times slower"
pip install -c deploy/constraints.txt --force-reinstall --no-deps pillow
