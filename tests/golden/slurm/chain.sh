#!/bin/bash
#SBATCH --job-name=foundation-20260131-142501-3f9a
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=1440
#SBATCH --signal=B:USR1@600
#SBATCH --chdir=/home/ada/frontier
#SBATCH --output=/lustre/runs/foundation-20260131-142501-3f9a/slurm/output.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --kill-on-invalid-dep=yes

runs=(/lustre/runs/foundation-20260131-142501-3f9a)
num_nodes=32
max_requeues=50
preflight_seconds=300
srun_options=(--overlap --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --mpi=none)
python=(/home/ada/venv/bin/python)
driver=recipes.job
node_options=(--ranks=8 --gpus=8)
preflight_options=(--infiniband-ports=8 --infiniband-gbit=400 --disk-gib=100)
bandwidth_options=(--intra-node=300 --node-pair=300 --seconds=300)
choose_options=(--clock-seconds=1)
before() {
    :
}
after() {
    :
}

