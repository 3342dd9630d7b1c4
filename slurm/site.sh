# What differs from one cluster to the next; the one file here to edit. Sourced by every job on its first node.
# shellcheck shell=bash disable=SC2034

# Python, unless the job was submitted from an activated environment:
# module load cuda/12.8
# source "$root/.venv/bin/activate"

# What every rank runs in. The image holds Python and the requirements; the code comes from the job's snapshot.
# container=(apptainer exec --nv --bind "$PWD" pal_ds.sif)                                       # apptainer
# srun_options+=(--container-image="$PWD/pal_ds.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") # enroot

# Which network the ranks meet on, where a node has several:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Accounts and partitions belong to sbatch: `sbatch --account A --partition P ...`, or SBATCH_ACCOUNT and SBATCH_PARTITION.
