"""Losses of REINFORCE, A2C, PPO and IMPALA: `(batch, actor, *, hyperparameters) -> (loss, info)`.

    loss = info["policy"] + c_value * info["value"] - c_entropy * info["entropy"]

`loss` is a scalar to call `backward` on; `info` holds detached scalars. The action a_t is taken at row t of the state
and stored in row t+1, together with the reward and the flags of its step; there are T of them in each column.

Every mean, normalization and trace uses `batch.mask`: rows without an action of their own count for nothing, whatever
they hold. They are cut out with `where`, never by multiplication (0 * NaN is NaN), and no trace crosses them. A batch
without a single action has a loss of zero.

Truncation is not termination: `batch.final_value` holds the values of the final observations of truncated episodes. It
was computed by the behaviour policy, as the observations themselves are not recorded.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from zrl.algo.returns import VTrace, gae, returns, vtrace
from zrl.algo.unroll import map_nested

__all__ = ["Actor", "Batch", "Info", "State", "a2c", "advantages", "impala", "ppo", "reinforce"]

Info = dict[str, Tensor]


class State(Protocol):
    """What the environments said: leaves [T+1, B, ...], observations and actions arbitrarily nested."""

    @property
    def obs(self) -> Any: ...
    @property
    def act(self) -> Any: ...
    @property
    def rew(self) -> Tensor: ...
    @property
    def fin(self) -> Tensor: ...
    @property
    def term(self) -> Tensor: ...
    def rows(self, start: int, stop: int) -> "State":
        """The same structure, every leaf cut to rows start ... stop-1."""


class Batch(Protocol):
    """Fragments side by side: B columns of T steps."""

    @property
    def state(self) -> State: ...
    @property
    def actor(self) -> Mapping[str, Any]:
        """What the actor returned as it acted, [T, B, ...]: "log_prob" or what it is made of, and "value" for `ppo`."""

    @property
    def hx(self) -> Any:
        """Recurrent state at row 0, [L, B, ...], nested."""

    @property
    def bootstrap(self) -> Tensor:
        """v(x_T), [1, B]."""

    @property
    def final_value(self) -> Tensor:
        """v(final observation) where the step into a row was truncated, 0 elsewhere; [T+1, B]."""

    @property
    def mask(self) -> Tensor:
        """Where an action was really taken, [T, B] bool."""

    @property
    def extra(self) -> Mapping[str, Tensor]:
        """What was added to the batch before it was cut into minibatches, [T, B]: see `advantages`."""


class Actor(Protocol):
    """A policy network with its density. Resets its recurrent state before rows with `fin` by itself."""

    def __call__(self, obs: Any, act: Any, rew: Tensor, fin: Tensor, *, hx: Any) -> tuple[Any, Any, Any]: ...
    def log_prob(self, info: Any, act: Any) -> Tensor: ...
    def entropy(self, info: Any) -> Tensor: ...


# -- the losses ------------------------------------------------------------------------------------------------------


def reinforce(batch: Batch, actor: Actor, *, gamma: float = 0.99, c_entropy: float = 0.01) -> tuple[Tensor, Info]:
    """Policy gradient with returns, a baseline and importance weights min(1, pi / mu); no value is learnt.

    The baseline is the mean of the returns over the time of each column. `info` has `returns`, their mean, in addition
    to `policy`, `entropy`, `kl` (of pi from mu, estimated) and `rho_mean` (the mean of pi / mu).
    Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
    """
    mask = _Mask(batch.mask)
    rew, fin, final_value = _steps(batch, mask)
    new, _ = _forward(batch, actor, mask)
    ret = returns(rew, fin, gamma=gamma, bootstrap=batch.bootstrap[0], final_value=final_value)
    score = (ret - mask.mean(ret, dim=0)) * new.rho.clamp(max=1)
    policy, entropy = -mask.mean(new.log_pi * score), mask.mean(new.entropy)
    return policy - c_entropy * entropy, _info(new, mask, policy=policy, entropy=entropy, returns=mask.mean(ret))


def a2c(
    batch: Batch,
    actor: Actor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    c_value: float = 0.5,
    c_entropy: float = 0.01,
    normalize: bool = True,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
) -> tuple[Tensor, Info]:
    """Advantage actor-critic with V-trace advantages `vs - v`: GAE(gamma, lam) where nothing lags, corrected elsewhere.

    normalize=True gives the advantages mean 0 and deviation 1 over the actions of the batch. The value loss is
    (vs - v)^2 / 2. `info` has `policy`, `value`, `entropy`, `kl` and `rho_mean`.
    Mnih et al. 2016, "Asynchronous methods for deep reinforcement learning"; see `vtrace`.
    """
    mask = _Mask(batch.mask)
    new, value, target = _corrected(batch, actor, mask, gamma=gamma, lam=lam, clip_rho=clip_rho, clip_c=clip_c)
    # No further factor of rho: min(clip, rho_t) is in every term of vs_t - v_t already.
    adv = target.vs - value.detach()
    policy = -mask.mean(new.log_pi * (_normalized(adv, mask) if normalize else adv))
    return _actor_critic(new, mask, policy, (value - target.vs).square(), c_value, c_entropy)


def impala(
    batch: Batch,
    actor: Actor,
    *,
    gamma: float = 0.99,
    lam: float = 1.0,
    c_value: float = 0.5,
    c_entropy: float = 0.01,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    clip_pg_rho: float | None = None,
) -> tuple[Tensor, Info]:
    """V-trace actor-critic; the losses are means, where the paper has sums. `info` is that of `a2c`.

    Espeholt et al. 2018, "IMPALA: scalable distributed deep-RL with importance weighted actor-learner architectures",
    section 4.2.
    """
    clips = {"clip_rho": clip_rho, "clip_c": clip_c, "clip_pg_rho": clip_pg_rho}
    mask = _Mask(batch.mask)
    new, value, target = _corrected(batch, actor, mask, gamma=gamma, lam=lam, **clips)
    policy = -mask.mean(new.log_pi * target.adv)
    return _actor_critic(new, mask, policy, (value - target.vs).square(), c_value, c_entropy)


def ppo(
    batch: Batch,
    actor: Actor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    clip: float = 0.2,
    c_value: float = 0.5,
    c_entropy: float = 0.01,
    normalize: bool = True,
    clip_value: float | None = None,
) -> tuple[Tensor, Info]:
    """Proximal policy optimization with the clipped objective, for one minibatch.

    Takes the advantages `adv` and value targets `ret` [T, B] from `batch.extra` if they are there. They must be, for
    minibatches that were cut out of time: call `advantages` on the whole batch first. Otherwise they are computed here,
    from `gamma` and `lam`, which are used for nothing else. clip_value=c keeps the value within c of what it was when
    the actor acted (the larger loss of the two counts). `info` is that of `a2c` and `clip_fraction`, the share of
    actions whose ratio pi / mu is more than `clip` away from 1.
    Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7 and 9.
    """
    mask, known = _Mask(batch.mask), batch.extra
    known = known if "adv" in known and "ret" in known else advantages(batch, gamma=gamma, lam=lam)
    adv, ret = mask.keep(known["adv"], "adv"), mask.keep(known["ret"], "ret")
    new, info = _forward(batch, actor, mask)
    value, ratio = mask.keep(info["value"], "value"), new.log_rho.exp()

    adv = _normalized(adv, mask) if normalize else adv
    policy = -mask.mean(torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv))
    error = (value - ret).square()
    if clip_value is not None:
        old = mask.keep(batch.actor["value"], "value")
        error = torch.maximum(error, (old + (value - old).clamp(-clip_value, clip_value) - ret).square())
    clipped = mask.mean((ratio.detach() - 1).abs() > clip)
    return _actor_critic(new, mask, policy, error, c_value, c_entropy, clip_fraction=clipped)


@torch.no_grad()
def advantages(batch: Batch, *, gamma: float = 0.99, lam: float = 0.95) -> dict[str, Tensor]:
    """GAE `adv` and value targets `ret = adv + value`, [T, B], 0 where masked; for `batch.extra`.

    The values are those that the actor returned as it acted. Call it before the batch is cut into minibatches.
    """
    mask = _Mask(batch.mask)
    rew, fin, final_value = _steps(batch, mask)
    value = mask.keep(batch.actor["value"], "value")
    adv = gae(rew, fin, value, gamma=gamma, lam=lam, bootstrap=batch.bootstrap[0], final_value=final_value)
    return {"adv": adv, "ret": adv + value}


# -- what they share -------------------------------------------------------------------------------------------------


class _Mask:
    """Which entries [T, B] count. On the CPU, where it costs little to ask whether all do, they need not be cut out."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.is_full = mask.is_cpu and mask.numel() > 0 and bool(mask.all())

    def keep(self, x: Tensor, name: str) -> Tensor:
        """`x` with zeros where masked.

        Raises:
            ValueError: it is not [T, B]. A stray dimension would broadcast, to a wrong loss and no error.
        """
        if x.shape != self.mask.shape:
            raise ValueError(f"{name} must be [T, B] = {tuple(self.mask.shape)}, got {tuple(x.shape)}")
        return x if self.is_full else torch.where(self.mask, x, 0)

    def mean(self, x: Tensor, dim: int | None = None) -> Tensor:
        """Mean over unmasked entries, 0 if there are none."""
        if self.is_full:
            return x.mean(dim, dtype=None if x.is_floating_point() else torch.float32)
        return torch.where(self.mask, x, 0).sum(dim) / self.mask.sum(dim).clamp(min=1)


class _Forward(NamedTuple):
    """What the learner makes of the recorded actions, [T, B], zeros where masked."""

    log_pi: Tensor
    log_rho: Tensor  # log pi / mu, with gradient
    entropy: Tensor

    @property
    def rho(self) -> Tensor:
        return self.log_rho.detach().exp()


def _forward(batch: Batch, actor: Actor, mask: _Mask, *, n_ahead: int = 0) -> tuple[_Forward, Any]:
    """One pass over rows 0 ... T-1+n_ahead; its density and entropy at the T actions, and its info at all the rows."""
    n_steps = len(batch.mask)
    state, act = batch.state.rows(0, n_steps + n_ahead), batch.state.rows(1, n_steps + 1).act
    _, _, info = actor(state.obs, state.act, state.rew, state.fin, hx=batch.hx)
    at_actions = map_nested(lambda x: x[:n_steps] if isinstance(x, Tensor) and x.ndim else x, info) if n_ahead else info
    log_pi = mask.keep(actor.log_prob(at_actions, act), "log_prob")
    with torch.no_grad():
        behaviour = batch.actor["log_prob"] if "log_prob" in batch.actor else actor.log_prob(batch.actor, act)
    # exp(89) is inf in float32, and its gradient times zero is NaN. No clipping threshold is anywhere near e^20.
    log_rho = (log_pi - mask.keep(behaviour, "log_prob")).clamp(-20, 20)
    return _Forward(log_pi, log_rho, mask.keep(actor.entropy(at_actions), "entropy")), info


def _corrected(
    batch: Batch, actor: Actor, mask: _Mask, *, gamma: float, **options: Any
) -> tuple[_Forward, Tensor, VTrace[Tensor]]:
    """One pass over T+1 rows, the last one for v(x_T); values [T, B], with gradient, and V-trace targets, without."""
    new, info = _forward(batch, actor, mask, n_ahead=1)
    values: Tensor = info["value"]
    value = mask.keep(values[:-1], "value")
    rew, fin, final_value = _steps(batch, mask)
    with torch.no_grad():
        target = vtrace(
            rew, fin, value, rho=new.rho, gamma=gamma, bootstrap=values[-1], final_value=final_value, **options
        )
    return new, value, target


def _actor_critic(
    new: _Forward, mask: _Mask, policy: Tensor, error: Tensor, c_value: float, c_entropy: float, **more: Tensor
) -> tuple[Tensor, Info]:
    """Loss and info from the policy loss and the squared errors [T, B] of the values."""
    value, entropy = 0.5 * mask.mean(error), mask.mean(new.entropy)
    loss = policy + c_value * value - c_entropy * entropy
    return loss, _info(new, mask, policy=policy, value=value, entropy=entropy, **more)


def _info(new: _Forward, mask: _Mask, **scalars: Tensor) -> Info:
    # For actions of mu, rho - 1 - log rho >= 0 has the mean KL(mu || pi), and a smaller variance than -log rho.
    rho = new.rho
    kl = mask.mean(rho - 1 - new.log_rho.detach())
    return {k: x.detach() for k, x in {**scalars, "kl": kl, "rho_mean": mask.mean(rho)}.items()}


def _steps(batch: Batch, mask: _Mask) -> tuple[Tensor, Tensor, Tensor]:
    """Reward, end and final value of the T steps, [T, B]; where masked they are 0, True and 0."""
    s = batch.state
    rew, final_value = mask.keep(s.rew[1:], "rew"), mask.keep(batch.final_value[1:], "final_value")
    return rew, s.fin[1:] if mask.is_full else s.fin[1:] | ~mask.mask, final_value


def _normalized(x: Tensor, mask: _Mask) -> Tensor:
    """Shifted and scaled to mean 0 and deviation 1 over unmasked entries."""
    x = x - mask.mean(x)
    return x / (mask.mean(x.square()).sqrt() + 1e-8)
