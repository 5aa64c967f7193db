#!/bin/sh
# One node of a Ray cluster with token authentication, until it is stopped.
#   start-ray.sh head [options of `ray start`]
#   start-ray.sh worker HOST:PORT [options of `ray start`]
#   RAY_AUTH_TOKEN_PATH  the token (default: ~/.ray/auth_token); made by a head that finds none, copied to each worker
# Jobs that are submitted without --working-dir run in the project's folder, with the environment of the head.
set -eu
cd "$(dirname "$0")/.."

export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
# What `ray job stop` waits before it kills: Ray's own 3 seconds are too short for a checkpoint on its way to S3.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-300}"
# What a node waits for its work when it is asked to end; `docker stop` kills after 10 seconds.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-5}"
# Ray's 15 spares whoever sits at the machine; of a cluster's node that is nobody.
export RAY_worker_niceness="${RAY_worker_niceness:-0}"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"

role=${1:-}
case $role in
head)
    shift
    sh deploy/ray-token.sh "$RAY_AUTH_TOKEN_PATH"
    exec ray start --head --block --disable-usage-stats "$@"
    ;;
worker)
    [ $# -ge 2 ] || { echo "start-ray.sh: name the head: start-ray.sh worker HOST:6379" >&2; exit 2; }
    address=$2
    shift 2
    [ -s "$RAY_AUTH_TOKEN_PATH" ] || {
        echo "start-ray.sh: no token at $RAY_AUTH_TOKEN_PATH; copy the head's there (scp -p), or set RAY_AUTH_TOKEN_PATH" >&2
        exit 2
    }
    exec ray start --address "$address" --block --disable-usage-stats "$@"
    ;;
*)
    echo "usage: start-ray.sh head|worker HOST:PORT [options of ray start]" >&2
    exit 2
    ;;
esac
