#!/bin/bash
# A server, and a worker on each node; the flags are those of server.py, such as --dataset mnist.
#SBATCH --job-name=perfedavg
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120

cd "$SLURM_SUBMIT_DIR" || exit
export PERFEDAVG_TOKEN=$(.venv/bin/python -c 'import secrets; print(secrets.token_hex(32))')
ip=$(hostname -I | cut -d ' ' -f 1)               # the first address of this node; choose the one of your network
port=$((20000 + SLURM_JOB_ID % 10000))            # so that two jobs on a node do not meet

.venv/bin/python server.py --ip "$ip" --port "$port" --world_size $((SLURM_NTASKS + 1)) "$@" &
server=$!
trap 'kill -TERM "$server"; wait "$server"; exit' TERM     # time is nearly up: save a checkpoint
srun --kill-on-bad-exit=0 bash -c \
    'exec .venv/bin/python client_worker.py --ip "$0" --port "$1" --rank $((SLURM_PROCID + 1))' "$ip" "$port" &
wait "$server"
