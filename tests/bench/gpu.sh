#!/bin/sh
# All measurements that need a GPU, for a machine that is borrowed for minutes: at most nine on an H200.
#   sh tests/bench/gpu.sh OUT      [PYTHON=python3] [DEVICE=cuda]
# Writes OUT/gpu.json, OUT/rows.md (for `all.py --gpu-rows`) and OUT/log.txt. Needs torch 2.11, transformers 5 and diffusers
# with requests, urllib3, importlib_metadata and pillow; neither Ray nor pyarrow. A measurement that fails or takes too long
# is named at the end, and the others are kept. DEVICE=cpu is a dry run with a small model and no hurry.
set -u
cd "$(dirname "$0")/../.."
out=${1:?usage: gpu.sh OUT}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
mkdir -p "$out"
: >"$out/log.txt"
failed=

# measure SECONDS NAME SCRIPT FLAGS...
measure() {
    seconds=$1 name=$2 script=$3
    shift 3
    timeout "$((seconds * patience))" "$python" "tests/bench/$script.py" --device "$device" --json "$out/$name.json" "$@" \
        >"$out/$name.md" 2>>"$out/log.txt" || failed="$failed $name"
}

if [ "$device" = cuda ]; then
    preset=base share=128 patience=1
    set -- 32 64 128
else
    preset=tiny share=2 patience=10
    set -- 1 2
fi
# In the order of what is decided by it: attention kernels; the memory of stage 256; its savings; recomputation at 1024.
measure 60 attention attention --sides 16 64
for micro; do
    measure 45 "memory-256-$micro" train_step --stage 256 --preset $preset --share "$micro" --micro "$micro" \
        --texts full --only-all-on --rounds 1
done
if [ "$device" = cuda ]; then
    measure 160 step-256 train_step --stage 256 --share $share --micro 64 --rounds 2 --peer prx --syncs
    measure 100 step-1024-none train_step --stage 1024 --share 16 --micro 4 --rounds 1 --only-all-on
    measure 80 step-1024-all train_step --stage 1024 --share 16 --micro 16 --rounds 1 --only-all-on --checkpointing all
else
    measure 180 step-256 train_step --stage 256 --preset $preset --share $share --micro 1 --rounds 1 --peer prx --syncs
fi
"$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
parts = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.stem != "gpu"}
(out / "gpu.json").write_text(json.dumps(parts, indent=1))
(out / "rows.md").write_text("".join(path.read_text() for path in sorted(out.glob("*.md")) if path.stem != "rows"))
PYTHON
[ -z "$failed" ] || { echo "gpu.sh: failed or too slow:$failed; see $out/log.txt" >&2; exit 1; }
