"""What is run: the papers' grids, the quickstart, ablations, and the one runner of all of them.

Here belongs what turns a command line into jobs and carries them out; what their results are worth
is `report`'s. Start at job.py, what a job is and what its folder holds. runner.py carries jobs out
on this machine, slurm.py on a cluster. The others make jobs: runs.py of a detector's run,
classifiers.py of a classifier's and frozen.py of an evaluation of frozen features, which share
encoder_runs.py; grid.py and reproduction.py of the papers' tables, which preflight.py asks for
problems first; quickstart.py of drawn images, ablation.py of a grid of pretraining flags.
"""
