#!/bin/sh
# What pyproject.toml asks for, without the project itself, so that an image's layer of it outlives changes of the code.
#   install-dependencies.sh CONSTRAINTS [EXTRA...]      /wheels may hold a pillow-simd
set -eu
constraints=$1
shift
python - "$@" >/tmp/requirements.txt <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
asked = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
print(*project["dependencies"], *sum(asked, []), sep="\n")
PYTHON
pip install --quiet -c "$constraints" -r /tmp/requirements.txt
rm /tmp/requirements.txt
# It owns the same PIL folder as pillow, which other packages require by name: so it goes over it.
for wheel in /wheels/*.whl; do
    [ ! -e "$wheel" ] || pip install --quiet --no-deps --force-reinstall "$wheel"
done
