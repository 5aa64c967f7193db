#!/bin/sh
# Runs the whole chain through the job files. Called by `make demo`.
#   DATA   raw parquet shards to use instead of the drawn sample dataset
#   DEMO   output folder (default: demo; with DATA, the name of that folder is appended)
#   STEPS  training steps (default: those of the stage; 300 with DATA)
set -eu
DEMO=${DEMO:-demo}
python() { .venv/bin/python "$@"; }

if [ -n "${DATA:-}" ]; then
    # The checksum keeps apart datasets whose folders have the same name.
    DEMO="$DEMO-$(basename "$DATA")-$(realpath "$DATA" | cksum | cut -d ' ' -f 1)"
    raw=$DATA
    STEPS=${STEPS:-300}
else
    raw="$DEMO/raw"
    python pipeline/sample_data.py --out "$raw" --seed "${SEED:-0}"
fi

python pipeline/ingest.py --raw "$raw" --dataset "$DEMO/dataset"
python pipeline/caption.py --dataset "$DEMO/dataset" --engine tags
python pipeline/curate.py --dataset "$DEMO/dataset" --stage demo
python trainer/run.py --stage demo --dataset "$DEMO/dataset" --run "$DEMO/run" ${STEPS:+--steps "$STEPS"}

if [ -n "${DATA:-}" ]; then
    python trainer/sample.py --run "$DEMO/run" --gallery --out "$DEMO/pictures"
else
    python trainer/sample.py --run "$DEMO/run" --gallery --guidance 4 --colour-agreement 128 --out "$DEMO/pictures" --prompt \
        "red mushroom, white background" "blue butterfly" "green tree, outdoors" "yellow moon, night sky" \
        "purple house" "pink flower, grey background" "orange ball, gradient background" "aqua umbrella"
fi
