#!/bin/bash
#SBATCH --job-name=foundation-20260131-142501-3f9a
#SBATCH --nodes=256
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

runs=(/lustre/runs/foundation-20260131-142501-3f9a)
num_nodes=256
max_requeues=50
preflight_seconds=300
srun_options=(--overlap --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --mpi=none)
python=(apptainer exec --nv --bind=/home/ada/frontier:/home/ada/frontier --bind=/lustre/runs:/lustre/runs --pwd=/home/ada/frontier /images/train.sif python)
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

