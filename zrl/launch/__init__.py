"""Learner and hosts on the machines of a cluster: placement and restarts are an existing engine's, zrl moves the data.

`slurm` and `k8s` make text, which Slurm and Kubernetes run; `ray` keeps hosts as actors of a Ray cluster. What they run
are ``zrl learner`` and ``zrl worker``, the same as by hand.
"""
