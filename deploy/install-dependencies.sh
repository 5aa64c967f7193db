#!/bin/sh
# Installs the dependencies in pyproject.toml without the project, so that code changes do not invalidate the image layer.
#   install-dependencies.sh CONSTRAINTS [EXTRA...]
# Wheels in /wheels (pillow-simd) are installed last.
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
# pillow-simd overwrites the PIL folder of pillow, which other packages require by name.
for wheel in /wheels/*.whl; do
    [ ! -e "$wheel" ] || pip install --quiet --no-deps --force-reinstall "$wheel"
done
