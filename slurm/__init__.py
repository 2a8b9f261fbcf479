"""Asking a Slurm cluster for nodes, and making them a Ray cluster that a run's driver joins.

`script.py` (pure) writes a job as text; `ray_cluster.sh` is the part all jobs share: check the nodes, choose those that
get ranks, start Ray and the driver, and decide by the exit code whether the job ends, starts over or is queued again.
`submit.py` hands jobs in, `queue.py` asks Slurm about them, `python -m slurm` follows and stops them. On the nodes,
`preflight.py` and `bandwidth.py` look at one node, `choose.py` (pure) at what all have said, and `node.py` runs Ray.

Nothing here knows what a run computes: it is given run directories and a command. Only `bandwidth.py` imports torch.
"""
