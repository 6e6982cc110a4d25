"""``zrl launch``: learner and hosts on the machines of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from zrl.cli.failures import EXIT_USAGE, Failure, failures, usage
from zrl.cli.options import settings_of
from zrl.cli.train import learner_command
from zrl.config import value_of
from zrl.errors import ConfigError
from zrl.train.run_folder import RunFolder

if TYPE_CHECKING:
    from zrl.launch.plan import Plan

Command = Callable[..., None]


@click.group("launch")
def launch_command() -> None:
    """Run a learner and hosts of workers on a cluster. ENV and what follows `--` are words of `zrl learner`.

    \b
    zrl launch slurm --keys keys --hosts 4 --workers-per-host 16 -- CartPole-v1 --algo impala --envs 256 > job.sh
    zrl launch k8s --image IMAGE --keys keys --hosts 4 -- CartPole-v1 --algo impala --envs 256 > run.yaml
    zrl launch ray --keys /shared/keys --workers-per-host 16 -- CartPole-v1 --algo impala --envs 256
    """


def plan_options(command: Command) -> Command:
    """What the verbs that make a file have in common."""
    for add in (
        click.option("--force", is_flag=True, help="let --output replace a file"),
        click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="[default: the terminal]"),
        click.option("--port", type=int, default=5555, show_default=True, help="the learner's; it takes the next, too"),
        click.option("--import", "imports", multiple=True, metavar="MODULE", help="as for zrl worker; repeatable"),
        click.option(
            "--keys", required=True, metavar="DIR", help="folder of the keys; docs/launch.md says how to make it"
        ),
        workers_per_host_option,
        click.option("--hosts", type=click.IntRange(1, 4096), default=1, show_default=True, help="hosts of workers"),
        words_argument,
    ):
        command = add(command)
    return command


words_argument = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[--] ENV [WORDS OF ZRL LEARNER]...")
workers_per_host_option = click.option(
    "--workers-per-host", type=click.IntRange(1, 4096), default=4, show_default=True, help="workers of each, a CPU each"
)


@launch_command.command("slurm")
@plan_options
@click.option("--job-name", default="zrl", show_default=True)
@click.option("--partition", help="of all nodes")
@click.option("--host-partition", help="of the hosts, where theirs is another")
@click.option("--account")
@click.option("--time", help="limit, as Slurm writes it: 90, 12:00:00, 2-00:00:00")
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True, help="of the learner")
@click.option("--gpus", help="of the learner, such as 1 or a100:1; it gets --device cuda then")
@click.option("--activate", metavar="FOLDER", help="virtual environment that has zrl, on all nodes")
def slurm_command(output: Path | None, force: bool, **given: Any) -> None:
    """Print a batch script: the learner on one node, HOSTS nodes with workers for it, in one job.

    It is preempted, queued again and cancelled as a whole; the learner saves a checkpoint, and goes on from it.
    """
    from zrl.launch.slurm import Slurm, script

    with usage():
        words = ("keys", "job_name", "partition", "host_partition", "account", "time", "cpus", "gpus", "activate")
        slurm = Slurm(**{word: given[word] for word in words})
        text = script(_plan(given, gpu=given["gpus"] is not None), slurm)
    _put(text, output, force, 0o777)


@launch_command.command("k8s")
@plan_options
@click.option("--image", required=True, help="with zrl and the environment")
@click.option("--name", default="zrl", show_default=True, help="of everything, with a suffix")
@click.option("--namespace", help="[default: that of kubectl]")
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True, help="of the learner")
@click.option("--memory", default="4Gi", show_default=True, help="of the learner")
@click.option("--gpus", type=click.IntRange(0), default=0, help="of the learner; it gets --device cuda then")
@click.option("--host-memory", default="4Gi", show_default=True, help="of each host")
@click.option("--shm", default="1Gi", show_default=True, help="size of /dev/shm of every pod")
@click.option("--claim", help="PersistentVolumeClaim for run folders  [default: they go with the learner's pod]")
@click.option("--user", type=click.IntRange(1), default=1000, show_default=True, help="numeric user of all containers")
def k8s_command(output: Path | None, force: bool, **given: Any) -> None:
    """Print manifests: a Job for the learner, a Service that finds it, a Deployment of HOSTS pods with workers.

    No key stands in them: comments say how to make the Secrets from --keys.
    """
    from zrl.launch.k8s import Kubernetes, manifest

    with usage():
        words = ("image", "keys", "name", "namespace", "cpus", "memory", "gpus", "host_memory", "shm", "claim", "user")
        k8s = Kubernetes(**{word: given[word] for word in words})
        text = manifest(_plan(given, gpu=given["gpus"] > 0, files=False), k8s)
    _put(text, output, force, 0o666)


class HostCount(click.ParamType[Any]):
    """A number, or ``auto``, which is None."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "auto":
            return None
        try:
            return click.IntRange(1, 4096).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"expected a number from 1, or auto, not {value!r}", param, ctx)


@launch_command.command("ray")
@words_argument
@click.option("--address", default="auto", show_default=True, help="of the Ray cluster")
@click.option(
    "--hosts", type=HostCount(), default="auto", show_default=True,
    help="hosts of workers; auto: one on each node with enough CPUs, also on those that join later",
)  # fmt: skip
@workers_per_host_option
@click.option(
    "--cpus-per-host", type=click.FloatRange(0, min_open=True), help="of Ray's  [default: one for each worker]"
)
@click.option(
    "--gpus", type=click.FloatRange(0), default=0,
    help="of the learner, which a node that has them runs then, with --device cuda  [default: none; on this machine]",
)  # fmt: skip
@click.option("--connect", default="", metavar="URL", help="hosts for a learner that is there already, instead of ENV")
@click.option(
    "--keys", type=click.Path(path_type=Path), metavar="DIR",
    help="folder of the keys, the same path on every node; needed where there are several machines",
)  # fmt: skip
@click.option("--insecure", is_flag=True, help="go without keys on several machines")
@click.option("--import", "imports", multiple=True, metavar="MODULE", help="as for zrl worker; repeatable")
@click.option("--env-kwargs", default=None, metavar="JSON", help="as for zrl worker, with --connect")
@click.option("--port", type=int, default=5555, show_default=True, help="the learner's; it takes the next, too")
def ray_command(**given: Any) -> None:
    """Run hosts of workers as actors of a Ray cluster, and a learner, until it is done.

    Hosts are started again elsewhere when their node dies. The first Ctrl-C or SIGTERM saves a checkpoint and stops
    everything, the second one kills. The exit code is that of the learner.
    """
    from zrl.launch.plan import Plan
    from zrl.launch.ray import RayOptions, launch

    per_host, connect, gpus = given["workers_per_host"], given["connect"], given["gpus"]

    def plan_for(hosts: int) -> Plan:
        counted = {**given, "hosts": hosts}
        if not connect:
            return _plan(counted, gpu=gpus > 0)
        kwargs = given["env_kwargs"] and value_of("env_kwargs", given["env_kwargs"], "--env-kwargs")
        return Plan((), hosts, per_host, imports=given["imports"], env_kwargs=kwargs, port=given["port"])

    with usage():
        if bool(connect) == bool(given["words"]):
            raise ConfigError("expected either ENV and words of zrl learner, or --connect URL of one that is there")
        if not connect and given["env_kwargs"]:
            raise ConfigError("--env-kwargs: with a learner of its own they belong behind --, to the learner's words")
        if given["keys"] and given["insecure"]:
            raise ConfigError("--insecure: makes no sense with --keys; leave one of them out")
        plan_for(given["hosts"] or 1)
    options = RayOptions(
        given["address"], given["hosts"], given["cpus_per_host"] or float(per_host), gpus, connect, given["keys"],
        given["insecure"],
    )  # fmt: skip
    with failures() as signals:
        code = launch(options, plan_for, click.echo, signals)
    raise SystemExit(code)


def _plan(given: dict[str, Any], *, gpu: bool, files: bool = True) -> Plan:
    """What is to be launched. With `files` the learner's words may name files: they are read here, too.

    Raises:
        ConfigError: words that `zrl learner` would refuse.
    """
    from zrl.launch.plan import plan_of

    hosts, per_host = given["hosts"], given["workers_per_host"]
    words = list(given["words"])
    settings = _parsed(words)
    if settings["workers"] is not None:
        raise ConfigError("--workers: is --hosts times --workers-per-host here; leave it out")
    if gpu and settings["device"] is None:
        words += ["--device", "cuda"]
    settings = _parsed([*words, "--workers", str(hosts * per_host)])
    for name in ("require_goal", "expect_workers"):  # no settings of the run
        settings.pop(name)
    resume, file = settings.pop("resume"), settings.pop("file")
    if not files and (resume or file or str(settings["env"]).endswith(".toml")):
        raise ConfigError(
            "--resume, --config: nothing on this machine is there in the cluster; give settings as options"
        )
    resumed = None if resume is None else RunFolder.open(resume)
    config = settings_of(settings, settings.pop("sets"), file, resumed)
    return plan_of(
        words,
        config,
        hosts=hosts,
        workers_per_host=per_host,
        imports=given["imports"],
        port=given["port"],
        resumes=resume is not None,
    )


def _parsed(words: list[str]) -> dict[str, Any]:
    """The settings that `zrl learner` would see. Addresses and keys are not the learner's to choose here."""
    with learner_command.make_context("zrl learner", list(words)) as context:
        for name in ("bind", "keys", "insecure"):
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise ConfigError(f"--{name}: zrl launch gives it to the learner; leave it out behind --")
            del context.params[name]
        return context.params


def _put(text: str, output: Path | None, force: bool, mode: int) -> None:
    """To the terminal, or into a new file."""
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        how = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
        with open(os.open(output, how, mode), "w") as file:
            file.write(text)
        if force:
            output.chmod(output.stat().st_mode | (mode & 0o111))
    except FileExistsError:
        raise Failure(f"--output: {output} is there already; choose another, or --force", EXIT_USAGE) from None
    except OSError as error:
        raise Failure(f"--output: {output} cannot be written: {error.strerror}", EXIT_USAGE) from None
