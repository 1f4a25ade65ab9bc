"""One interface to start and end jobs: on this machine, as Slurm jobs, or as steps of one Slurm job."""
