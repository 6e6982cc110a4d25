"""A training loop of one's own on several GPUs: each process has its own workers, and all share one gradient.

    torchrun --nproc-per-node=2 scripts/ddp_loop.py [--env CartPole-v1] [--updates 300]

What makes it several: `DistributedDataParallel` around the loss, another seed for the workers of each process, and the
same number of updates everywhere, for a backward pass waits for those of all others. Nothing of zrl knows of it: the
rollout publishes the weights of the actor inside, which are the same in all processes after each step.

`torchrun -m zrl learner` does this with workers on other machines, see docs/distributed.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zrl
from zrl import algo, zoo
from zrl.rollout import multi


class Loss(nn.Module):
    """The loss as the output of a module: so DistributedDataParallel sees which parameters get a gradient."""

    def __init__(self, actor: zrl.BaseActorModule) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, batch: zrl.Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return algo.impala(batch, self.actor, c_entropy=0.005)


def mean_return(batch: zrl.Batch, device: torch.device) -> float:
    """Over the episodes that ended in the batches of all processes; NaN without any."""
    sums = torch.tensor([sum(e.ret for e in batch.episodes), len(batch.episodes)], dtype=torch.float32, device=device)
    dist.all_reduce(sums)
    total, n = sums.tolist()
    return total / n if n else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="a Gymnasium id")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node=2 scripts/ddp_loop.py")
    torch.set_num_threads(1)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # who waits longer than this for the others fails, instead of waiting for ever
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=3))
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank = dist.get_rank()

    def make_env() -> gym.Env[Any, Any]:
        return gym.make(args.env)

    env = make_env()
    actor = zoo.MLPActor(env.observation_space, env.action_space).to(device)
    env.close()
    loss_of = nn.parallel.DistributedDataParallel(Loss(actor))  # parameters are those of process 0 now
    optimizer = torch.optim.Adam(actor.parameters(), lr=2e-3)
    entropy = int(np.random.SeedSequence([args.seed, rank]).generate_state(1, np.uint64)[0])
    with multi.rollout(
        make_env,
        actor,
        n_steps=16,
        n_actors=args.workers,
        n_per_actor=8,
        n_buffers=2 * args.workers,
        n_per_batch=args.workers,
        device=device,
        entropy=entropy,
    ) as rollout:
        for update, batch in zip(range(1, args.updates + 1), rollout, strict=False):
            loss, _ = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()  # the gradients of all processes, averaged
            nn.utils.clip_grad_norm_(actor.parameters(), 0.25)
            optimizer.step()
            mean = mean_return(batch, device)
            if rank == 0 and (update % 20 == 0 or update == args.updates):
                print(f"update {update:5d}: mean return {mean:6.1f}, version {batch.version}", flush=True)
        # the last exchange comes before the rollout closes, which takes a while: gloo's threads outlive the group under
        # DistributedDataParallel, and let go of the tensors behind our back; the interpreter must not be ending then
        weights = nn.utils.parameters_to_vector(actor.parameters()).detach()
        of_all = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, weights)
        if rank == 0:
            same = all(torch.equal(weights, other) for other in of_all)
            print(f"weights of {len(of_all)} processes: {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
