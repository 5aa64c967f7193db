#!/bin/sh
# Sets up .venv with the versions of deploy/constraints.txt. Called by make, which knows whether it is needed.
#   setup.sh [PYTHON]
set -eu
python=${1:-python3}

. deploy/venv.sh
make_venv .venv "$python"

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

echo "setup: installing into .venv (about 2 minutes the first time)"
# torch first and by its exact version: any later range is then satisfied by it.
pip install -c deploy/constraints.txt torch==2.13.0
pip install -c deploy/constraints.txt -e '.[trainer,web,dev]'

# The web page's tests need a browser, and skip without.
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && can_install; then
    echo "setup: installing chromium for the tests of the web page, if this system has it"
    { apt-get update -qq >/dev/null 2>&1 && apt_install chromium; } || true
fi

# pillow-simd decodes and resizes up to twice as fast and is source only. It owns the same PIL folder as pillow, which
# other packages require by name: so pillow stays installed, and pillow-simd is built over it.
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
    # The headers of the distribution's own Python; any other Python brings them along.
    apt_install python3-dev || true
fi
if can_compile && avx2; then
    echo "setup: building pillow-simd"
    if CC="cc -mavx2" pip install --no-binary pillow-simd --force-reinstall --no-deps "pillow-simd==$simd"; then
        exit 0
    fi
fi
echo "setup: NOTICE: plain pillow is used (no compiler, headers or AVX2 here): decoding is up to 2 times slower"
pip install -c deploy/constraints.txt --force-reinstall --no-deps pillow
