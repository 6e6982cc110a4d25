"""Algorithms on recorded fragments, and what actors need for them. Pure functions; they import torch only.

- `returns`, `gae`, `vtrace`, `n_step`, `td_error`: time recursions in O(log T) kernels, for torch and NumPy
- `reinforce`, `a2c`, `ppo`, `impala`: losses `(batch, actor, *, ...) -> (loss, info)`
- `advantages`: prepares a batch for the minibatches of `ppo`
- `unroll`: a recurrent core over T rows, reset where episodes end
- `categorical`, `mix_uniform`: sampling of actions, and the density of epsilon-greedy ones
"""

from zrl.algo.losses import Actor, Batch, Info, State, a2c, advantages, impala, ppo, reinforce
from zrl.algo.returns import VTrace, gae, n_step, returns, td_error, vtrace
from zrl.algo.sampling import categorical, mix_uniform
from zrl.algo.unroll import unroll

__all__ = [
    "Actor",
    "Batch",
    "Info",
    "State",
    "VTrace",
    "a2c",
    "advantages",
    "categorical",
    "gae",
    "impala",
    "mix_uniform",
    "n_step",
    "ppo",
    "reinforce",
    "returns",
    "td_error",
    "unroll",
    "vtrace",
]
