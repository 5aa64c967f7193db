#!/bin/sh
# Starts a node of docker-compose.yml's cluster: start-ray.sh with the values that Ray gets wrong in a container.
#   start-container.sh head|worker [options of `ray start`]
#   HDM_CPUS   CPUs for tasks on this node; 0 on the head, where the drivers run
#   HDM_GPUS   indices of the GPUs to use, such as 0,1; empty: all GPUs of the container
set -eu
role=$1
shift
token="$HOME/.ray/auth_token"
# The first of several networks. Ray would choose the one that leads to the internet.
address=$(hostname -i | cut -d ' ' -f 1)
# Ray would take a share of the memory and fall back to a folder on disk if shared memory is smaller.
shared=$(df --output=size -B1 /dev/shm | tail -n 1)
set -- --node-ip-address "$address" --num-cpus "$HDM_CPUS" --object-store-memory $((shared * 9 / 10)) "$@"
[ -z "${HDM_GPUS:-}" ] || export CUDA_VISIBLE_DEVICES="$HDM_GPUS"

if [ "$role" = head ]; then
    # Only within the compose network: docker-compose.yml publishes the port on 127.0.0.1.
    exec sh /app/deploy/start-ray.sh head --port 6379 --dashboard-host 0.0.0.0 "$@"
fi
listens() { python -c 'import socket; socket.create_connection(("head", 6379), 5)' 2>/dev/null; }
until [ -s "$token" ] && listens; do
    echo "start-container.sh: waiting for the head" >&2
    sleep 2
done
exec sh /app/deploy/start-ray.sh worker head:6379 "$@"
