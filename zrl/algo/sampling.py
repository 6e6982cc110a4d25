"""Sampling actions, as cheaply as a hot loop wants it, and the density of epsilon-greedy mixtures."""

import torch
from torch import Tensor

__all__ = ["categorical", "mix_uniform"]


def categorical(logits: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Sample indices with probability softmax(logits) along the last dimension; [..., n] floating -> [...] int64.

    Exponential races (the Gumbel-max trick): if E_i ~ Exp(1), then argmin_i E_i / p_i is distributed as p, and so is
    the argmin of log E_i - logits_i for logits without normalization. Logits of -inf are never sampled, unless all are:
    then the answer is 0.
    """
    logits = logits.detach()  # cheaper than no_grad, whose context costs as much as the sampling
    if logits.dtype.itemsize < 4:  # half precision has too few values to race with: ties go to the lower index
        logits = logits.float()
    # `exponential_` never returns 0 (torch documents it), hence no -inf + inf. All in the memory of the noise.
    return torch.empty_like(logits).exponential_(generator=generator).log_().sub_(logits).argmin(-1)


def mix_uniform(logits: Tensor, epsilon: float | Tensor) -> Tensor:
    """Log-probabilities of (1 - epsilon) * softmax(logits) + epsilon * uniform; [..., n] -> [..., n].

    Sample from the result with `categorical`, and gather `info["log_prob"]` from it: an actor that explores must report
    the density it samples from. `epsilon` in [0, 1] is a number, or a tensor that broadcasts against `logits` (a [B, 1]
    of per-column rates, say). The uniform part is shared by the actions with logits > -inf, so that masked actions stay
    impossible; they get -inf, and a gradient of zero.
    """
    masked = logits == -torch.inf
    eps = torch.as_tensor(epsilon, dtype=logits.dtype, device=logits.device)
    uniform = eps.log() - (~masked).sum(dim=-1, keepdim=True, dtype=logits.dtype).log()
    # Masked entries are replaced before `logaddexp`, whose gradient at (-inf, -inf) is NaN, and again after it.
    greedy = logits.log_softmax(dim=-1).masked_fill(masked, 0.0) + torch.log1p(-eps)
    return torch.logaddexp(greedy, uniform).masked_fill(masked, -torch.inf)
