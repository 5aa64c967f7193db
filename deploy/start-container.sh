#!/bin/sh
# A node of docker-compose.yml's cluster: start-ray.sh with what Ray would misjudge in a container.
#   start-container.sh head|worker [options of `ray start`]
#   HDM_CPUS   that Ray may give to tasks here; 0 for the head, where the drivers run
#   HDM_GPUS   numbers of the GPUs to use, as 0,1; empty: all that the container has
set -eu
role=$1
shift
token="$HOME/.ray/auth_token"
# Of several networks the first: Ray would look for the one that leads to the internet.
address=$(hostname -i | cut -d ' ' -f 1)
# Ray would take a share of the memory, and fall back to a folder on disk where shared memory is smaller.
shared=$(df --output=size -B1 /dev/shm | tail -n 1)
set -- --node-ip-address "$address" --num-cpus "$HDM_CPUS" --object-store-memory $((shared * 9 / 10)) "$@"
[ -z "${HDM_GPUS:-}" ] || export CUDA_VISIBLE_DEVICES="$HDM_GPUS"

if [ "$role" = head ]; then
    # Within the compose network; docker-compose.yml publishes it on 127.0.0.1 alone.
    exec sh /app/deploy/start-ray.sh head --port 6379 --dashboard-host 0.0.0.0 "$@"
fi
listens() { python -c 'import socket; socket.create_connection(("head", 6379), 5)' 2>/dev/null; }
until [ -s "$token" ] && listens; do
    echo "start-container.sh: waiting for the head" >&2
    sleep 2
done
exec sh /app/deploy/start-ray.sh worker head:6379 "$@"
