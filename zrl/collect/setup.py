"""An actor's ``setup``: what is different in each of its copies, before anything is collected."""

from __future__ import annotations

import warnings

import torch

from zrl.collect.actor import BaseActorModule
from zrl.collect.probe import check_actor, same_values
from zrl.collect.spaces import describe
from zrl.data.weights import WeightsManifest
from zrl.errors import ActorError, WeightsError


def set_up(actor: BaseActorModule, worker: int, n_columns: int, generator: torch.Generator, *, debug: bool) -> None:
    """Call ``setup`` of a copy that is about to act.

    Args:
        actor: on its device.
        worker: its index in the run.
        n_columns: B.
        generator: for this worker and this life of it.
        debug: warn of values that the next publish overwrites.

    Raises:
        ActorError: not an actor, an exception in it, or the copy has other parameters or buffers than before.
    """
    check_actor(actor)
    if type(actor).setup is BaseActorModule.setup:
        return
    manifest = WeightsManifest.of(actor)
    before = {name: x.detach().clone() for name, x in _travelling(actor).items()} if debug else {}
    try:
        actor.setup(worker, range(worker * n_columns, (worker + 1) * n_columns), generator)
    except Exception as e:
        raise ActorError(f"setup() of the actor raised {describe(e)}") from e
    try:
        manifest.require(WeightsManifest.of(actor))
    except WeightsError as e:
        what = "setup() changed which parameters and buffers there are; keep what it makes in plain attributes"
        raise ActorError(f"{what}: {e}") from e
    after = _travelling(actor)
    for name, x in before.items():
        if not same_values(x, after[name]):
            warnings.warn(
                f"setup() of the actor changed {name!r}, a parameter or buffer; that is lost at the next publish: keep "
                "what it makes in plain attributes",
                stacklevel=2,
            )


def _travelling(actor: BaseActorModule) -> dict[str, torch.Tensor]:
    return {**dict(actor.named_parameters()), **dict(actor.named_buffers())}
