#!/bin/sh
# Runs one node of a Ray cluster with token authentication until it is stopped.
#   start-ray.sh head [options of `ray start`]
#   start-ray.sh worker HOST:PORT [options of `ray start`]
#   RAY_AUTH_TOKEN_PATH  token file (default: ~/.ray/auth_token). The head creates it; copy it to each worker
# Jobs submitted without --working-dir run in the project's folder with the environment of the head.
set -eu
cd "$(dirname "$0")/.."

export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
# Seconds between `ray job stop` and the kill. Ray's default of 3 is too short to upload a checkpoint to S3.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-300}"
# Seconds that a stopping node waits for its tasks. `docker stop` kills after 10.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-5}"
# Ray's default of 15 is for machines with a user at the desk.
export RAY_worker_niceness="${RAY_worker_niceness:-0}"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# Seconds that Ray waits for parts of itself. Its default of 30 is too short for a busy machine.
export RAY_raylet_start_wait_time_s="${RAY_raylet_start_wait_time_s:-60}"
export RAY_gcs_server_port_wait_time_s="${RAY_gcs_server_port_wait_time_s:-120}"
# Idle processes to keep. Ray's default of one per CPU is too few for a row pipeline, whose tasks mostly wait.
export RAY_num_workers_soft_limit="${RAY_num_workers_soft_limit:-$((2 * $(nproc)))}"

role=${1:-}
case $role in
head)
    shift
    sh deploy/ray-token.sh "$RAY_AUTH_TOKEN_PATH"
    exec ray start --head --block --disable-usage-stats "$@"
    ;;
worker)
    [ $# -ge 2 ] || { echo "start-ray.sh: name the head, as in: start-ray.sh worker HOST:6379" >&2; exit 2; }
    address=$2
    shift 2
    [ -s "$RAY_AUTH_TOKEN_PATH" ] || {
        echo "start-ray.sh: no token at $RAY_AUTH_TOKEN_PATH; copy it from the head (scp -p), or set RAY_AUTH_TOKEN_PATH" >&2
        exit 2
    }
    exec ray start --address "$address" --block --disable-usage-stats "$@"
    ;;
*)
    echo "usage: start-ray.sh head|worker HOST:PORT [options of ray start]" >&2
    exit 2
    ;;
esac
