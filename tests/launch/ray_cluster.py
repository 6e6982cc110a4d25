"""A Ray cluster on this machine, in a process of its own: several nodes, which come and go as a line each says.

    add NAME CPUS GPUS   ─► added NAME
    kill NAME            ─► killed NAME      its raylet, with SIGKILL, and nothing else: the rest has to notice
    end of the input: everything ends

The first line of output is the address of the cluster.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

SMALL = {"object_store_memory": 80 << 20, "include_dashboard": False}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    print(cluster.address, flush=True)
    nodes = {}
    for line in sys.stdin:
        match line.split():
            case ["add", name, cpus, gpus]:
                nodes[name] = cluster.add_node(num_cpus=int(cpus), num_gpus=int(gpus), **SMALL)
                print("added", name, flush=True)
            case ["kill", name]:
                nodes[name].kill_raylet()  # and reaps it: as long as it is a zombie, its children take it for alive
                print("killed", name, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
