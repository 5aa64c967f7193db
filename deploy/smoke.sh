#!/bin/sh
# Runs everything up to a trained demo on docker-compose.yml's cluster twice: once undisturbed, once with a worker
# container killed during the ingest. Both must complete with equal results. Needs Docker, or the commands named by:
#   COMPOSE   default: docker compose        BUILD   default: docker build        ENGINE   default: docker
#   IMAGES    rows of the sample dataset (default: 1600)       STEPS   training steps (default: 20)
# It uses separate ports, volumes and credentials, and removes everything it started.
set -eu
cd "$(dirname "$0")/.."
COMPOSE=${COMPOSE:-docker compose}
BUILD=${BUILD:-docker build}
ENGINE=${ENGINE:-docker}
IMAGES=${IMAGES:-1600}
STEPS=${STEPS:-20}
export DASHBOARD_PORT="${DASHBOARD_PORT:-18265}" S3_PORT="${S3_PORT:-19000}"

project=hdm-smoke-$(od -An -N4 -tx1 /dev/urandom | tr -d " \n")  # unique prefix: names are filtered by prefix
scratch=$(mktemp -d)
files="-f docker-compose.yml"
say() { echo "smoke: $*"; }
fail() { say "FAILED: $*"; exit 1; }
# shellcheck disable=SC2086  # word splitting is intended
compose() { $COMPOSE --env-file "$scratch/env" -p "$project" --profile store $files "$@"; }
in_head() { compose exec -T head "$@" </dev/null; }
containers() {  # ids of a service's containers
    $ENGINE ps -q --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"
}
clean_up() {
    for _ in 1 2; do  # a container cannot be removed before those that depend on it
        for container in $($ENGINE ps -aq --filter "name=$project"); do
            $ENGINE rm --force "$container" >"$scratch/down" 2>&1 || true
        done
    done
    compose down --volumes >>"$scratch/down" 2>&1 || true
    left=$($ENGINE ps -aq --filter "name=$project" && $ENGINE volume ls -q --filter "name=$project")
    [ -z "$left" ] || { cat "$scratch/down"; say "could not remove everything of $project"; }
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# --- Images ---------------------------------------------------------------------------------------------------------

sh deploy/make-env.sh "$scratch/env"
[ "$(stat -c %a "$scratch/env")" = 600 ] || fail "other users can read the credentials"
build() {
    $BUILD -t "hdm-$1:0.1.0" -f deploy/Dockerfile --target "$1" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" . \
        >"$scratch/build" 2>&1 || { tail -n 30 "$scratch/build"; fail "the image $1 could not be built"; }
}
build pipeline
say "built hdm-pipeline:0.1.0"
for image in $(sed -n 's/^ *image: \(docker.io[^ ]*\)$/\1/p' docker-compose.yml); do
    if $ENGINE image inspect "$image" >/dev/null 2>&1 || $ENGINE pull -q "$image" >/dev/null 2>&1; then
        say "has $image"
        continue
    fi
    case $image in
    */versitygw:*)
        build s3
        files="$files -f deploy/smoke.yml"
        say "SKIPPED: cannot pull $image; moto's server replaces the store"
        ;;
    *) say "SKIPPED: cannot pull $image" ;;
    esac
done

# --- Cluster --------------------------------------------------------------------------------------------------------

compose up --detach --no-build head worker s3 make-bucket >"$scratch/up" 2>&1 || {
    cat "$scratch/up"
    fail "the containers did not start"
}
nodes() {
    in_head python -c '
import ray
ray.init("auto", logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))' 2>/dev/null
}
wait_for_nodes() {
    seconds=0
    until [ "$(nodes)" = "$1" ]; do
        seconds=$((seconds + 5))
        [ "$seconds" -lt 300 ] || { compose logs --tail 20; fail "the cluster did not reach $1 nodes"; }
        sleep 5
    done
    say "the cluster has $1 nodes"
}
wait_for_nodes 3
in_head python deploy/make_bucket.py s3://hdm
[ "$(in_head stat -c %a /home/hdm/.ray/auth_token)" = 600 ] || fail "other users can read Ray's token"
in_head sh -c '[ "$(id -u)" != 0 ]' || fail "the containers run as root"
say "it decodes with $(in_head python -c 'from pipeline.pictures.decoder import pillow_build; print(pillow_build())')"
if in_head env RAY_AUTH_MODE=disabled ray job submit -- true >"$scratch/refused" 2>&1; then
    fail "a job was accepted without the token"
fi
refusal=$(grep -m 1 -o 'AuthenticationError[^.]*' "$scratch/refused" || tail -n 1 "$scratch/refused")
say "ray job submit without the token: $refusal"
answer=$(in_head python -c "
import urllib.error, urllib.request
try:
    print(urllib.request.urlopen('http://127.0.0.1:8265/api/jobs/').status)
except urllib.error.HTTPError as error:
    print(error.code)")
[ "$answer" = 401 ] || fail "the dashboard answers $answer without the token"
say "the dashboard's API without the token: 401"

# --- Jobs -----------------------------------------------------------------------------------------------------------

# Shows the summary lines of jobs, without progress bars.
submit() {
    say "ray job submit -- python $*"
    in_head ray job submit -- python "$@" >"$scratch/job" 2>&1 || { tail -n 40 "$scratch/job"; fail "$1"; }
    shown
}
shown() { grep -E '^[a-z_]+: .*(rows in|to do|finished before)|^run: steps' "$scratch/job" | sed 's/^/    /'; }
ingest() { echo pipeline/ingest.py --raw s3://hdm/raw --rows-per-shard 16 --dataset "s3://hdm/$1"; }
rest_of_chain() {
    submit pipeline/caption.py --dataset "s3://hdm/$1" --engine tags
    submit pipeline/curate.py --dataset "s3://hdm/$1" --stage demo
    submit trainer/run.py --stage demo --dataset "s3://hdm/$1" --run "/data/run-$1" --steps "$STEPS"
}

submit pipeline/sample_data.py --out s3://hdm/raw --images "$IMAGES"
say "--- undisturbed"
# shellcheck disable=SC2046
submit $(ingest calm)
rest_of_chain calm

say "--- with a worker killed"
say "ray job submit -- python $(ingest killed)"
# Small shards, so that the kill comes between two of them.
# shellcheck disable=SC2046
in_head ray job submit --no-wait --submission-id ingest -- python $(ingest killed) >/dev/null 2>&1
finished() {  # waits for $1 shards and prints how many are finished
    in_head python -c "
import time
from pipeline.storage.shards import Store
count = lambda: len(Store('s3://hdm/killed').shards('images'))
while count() < $1: time.sleep(0.1)
print(count())"
}
victim=$(containers worker | head -n 1)
before=$(finished 3)
$ENGINE kill "$victim" >/dev/null
after=$(finished 0)
all=$(in_head python -c "from pipeline.storage.shards import Store; print(len(Store('s3://hdm/calm').shards('images')))")
say "killed worker container $victim: $before of $all shards were finished before the kill, $after right after it"
[ "$after" -lt "$all" ] || fail "the kill came after the last shard; use more IMAGES"
in_head ray job logs --follow ingest >"$scratch/job" 2>&1 || true
in_head ray job status ingest 2>&1 | grep -qi succeeded || { tail -n 40 "$scratch/job"; fail "the ingest did not succeed"; }
shown
wait_for_nodes 2
rest_of_chain killed

say "--- compared"
in_head python deploy/smoke_compare.py s3://hdm/calm /data/run-calm s3://hdm/killed /data/run-killed
say "PASSED: dataset and run after the kill equal those of the undisturbed jobs"
