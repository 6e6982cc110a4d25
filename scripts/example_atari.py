"""IMPALA on an Atari game: workers fill stacks of frames, the learner corrects for the age of what they send.

    python scripts/example_atari.py [--env ALE/Pong-v5] [--steps 20000] [--workers 2]

Needs ale-py and OpenCV: pip install 'zrl[atari]'. `zoo.make_atari` makes an environment whose observations are the last
four frames, uint8 ``[4, 84, 84]``; they are recorded as bytes, and the network turns them into floats.

Twenty thousand steps teach nobody Pong: millions would, which are hours of many cores. What this shows in a minute or
two is the pipeline, its rate, and with ``--steps 5000000`` where to begin.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import deque

import torch
from torch import nn

from zrl import algo, zoo
from zrl.rollout import multi


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ALE/Pong-v5", help="a game of ale-py")
    parser.add_argument("--steps", type=int, default=20_000, help="of the environments, four frames each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--n-steps", type=int, default=20, help="of each fragment")
    parser.add_argument("--hidden", type=int, default=256, help="size of the network's last layer")
    parser.add_argument("--start-method", choices=("fork", "spawn", "inline"), default="fork")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    make_env = functools.partial(zoo.make_atari, args.env)  # registers the games wherever it is called
    env = make_env()
    actor = zoo.CNNActor(env.observation_space, env.action_space, hidden=args.hidden)
    env.close()
    optimizer = torch.optim.RMSprop(actor.parameters(), lr=6e-4, alpha=0.99, eps=1e-2)
    returns: deque[float] = deque(maxlen=100)
    steps = updates = 0
    started = time.monotonic()
    with multi.rollout(
        make_env,
        actor,
        n_steps=args.n_steps,
        n_actors=args.workers,
        n_per_actor=4,
        n_buffers=2 * args.workers,  # one is filled while the other is copied
        n_per_batch=args.workers,
        max_lag=4,
        entropy=args.seed,
        start_method=args.start_method,
    ) as rollout:
        for batch in rollout:
            loss, info = algo.impala(batch, actor, c_entropy=0.01)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(actor.parameters(), 40.0)
            optimizer.step()
            steps, updates = steps + batch.n_env_steps, updates + 1
            returns.extend(episode.ret for episode in batch.episodes)
            if updates % 10 == 0 or steps >= args.steps:
                mean = sum(returns) / len(returns) if returns else float("nan")
                print(
                    f"{steps:9,} steps, {4 * steps / (time.monotonic() - started):6,.0f} frames/s, "
                    f"lag {max(batch.lag)}, entropy {info['entropy']:.3f}, "
                    f"mean return {mean:6.1f} of the last {len(returns)} episodes",
                    flush=True,
                )
            if steps >= args.steps:
                break
        print(rollout.stats()["verdict"])


if __name__ == "__main__":
    main()
