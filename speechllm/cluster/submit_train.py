"""speechllm-submit train and sweep."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from speechllm.cluster.job import Job, Variant
from speechllm.cluster.options import (
    add_job_options,
    checked_name,
    make_job,
    processes_of,
    require_data,
    site_of,
    submit_all,
)
from speechllm.cluster.profile import SiteProfile
from speechllm.config.load import dump_config, load_config
from speechllm.config.schema import Config
from speechllm.errors import ConfigError


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("train", help="train on one or more hosts")
    _config_options(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument(
        "--min-nodes", type=int, metavar="N",
        help="where a host is lost, go on with so many (default: wait for all)",
    )  # fmt: skip
    _process_options(parser)
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N",
        help="submit N times, each held on the one before (default: 1)",
    )  # fmt: skip
    add_job_options(parser)
    parser.set_defaults(command=train)


def add_sweep(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "sweep", help="train each combination of some values, in one array job"
    )
    _config_options(parser)
    parser.add_argument(
        "--vary", action="append", required=True, metavar="a.b=X,Y,...",
        help="values of a key; several keys make every combination",
    )  # fmt: skip
    _process_options(parser)
    add_job_options(parser)
    parser.set_defaults(command=sweep)


def train(options: argparse.Namespace) -> int:
    job, config = train_job(options, site_of(options))
    if options.chain < 1:
        raise ConfigError("--chain must be 1 or more")
    # The job reads this copy, so that the file may be changed while the job waits.
    submit_all([job], options, chain=options.chain, files={"config.yaml": dump_config(config)})
    return 0


def train_job(options: argparse.Namespace, site: SiteProfile) -> tuple[Job, Config]:
    """The job, and the configuration that it will read from its own folder.

    Raises ConfigError where configuration, profile and options do not fit together.
    """
    config = checked_config(options, options.overrides)
    assert config.run_dir is not None
    name = checked_name(options, Path(config.run_dir).name)
    min_nodes = options.nodes if options.min_nodes is None else options.min_nodes
    if not 1 <= min_nodes <= options.nodes:
        raise ConfigError("--nodes must be 1 or more, and --min-nodes between 1 and that")
    job = make_job(
        site,
        name=name,
        kind="train",
        run_dir=config.run_dir,
        arguments=("train", str(Path(config.run_dir, "cluster", name, "config.yaml"))),
        nodes=options.nodes,
        min_nodes=min_nodes,
        mode="single" if options.nodes == 1 else "pe" if site.pe else "array",
        launcher=options.launcher,
        **processes_of(options, site),
    )
    return job, config


def sweep(options: argparse.Namespace) -> int:
    job, configs = sweep_job(options, site_of(options))
    files = {f"config.{number}.yaml": dump_config(one) for number, one in enumerate(configs, 1)}
    submit_all([job], options, files=files)
    return 0


def sweep_job(options: argparse.Namespace, site: SiteProfile) -> tuple[Job, list[Config]]:
    """An array job with one task for each combination; each has a run directory below RUN."""
    base = checked_config(options, options.overrides)
    assert base.run_dir is not None
    name = checked_name(options, Path(base.run_dir).name)
    folder = Path(base.run_dir, "cluster", name)
    configs, variants = [], []
    for number, chosen in enumerate(combinations(options.vary), start=1):
        run_dir = str(Path(base.run_dir, variant_name(chosen)))
        overrides = [*options.overrides, *chosen, f"run_dir={run_dir}"]
        configs.append(checked_config(options, overrides))
        file = folder / f"config.{number}.yaml"
        variants.append(Variant(arguments=(str(file),), run_dir=run_dir))
    job = make_job(
        site,
        name=name,
        kind="train",
        run_dir=base.run_dir,
        arguments=("train",),
        variants=tuple(variants),
        launcher=options.launcher,
        **processes_of(options, site),
    )
    if len({config.run_dir for config in configs}) != len(configs):
        raise ConfigError("two combinations of --vary are the same")
    return job, configs


def combinations(varied: Sequence[str]) -> list[tuple[str, ...]]:
    """["a=1,2", "b=x,y"] -> [("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x"), ("a=2", "b=y")].

    Commas in brackets do not separate. Raises ConfigError where a key has no values.
    """
    choices = []
    for one in varied:
        key, equals, values = one.partition("=")
        parts = re.findall(r"(?:[^,\[\](){}]|\[[^\]]*\]|\{[^}]*\})+", values)
        if not equals or not key or not parts:
            raise ConfigError(f"--vary {one}: expected KEY=X,Y,..., as in optim.lr=1e-4,3e-4")
        choices.append([f"{key}={part}" for part in parts])
    return list(itertools.product(*choices))


def variant_name(chosen: Sequence[str]) -> str:
    """A directory for a combination: the last parts of the keys with their values."""
    short = (
        f"{one.partition('=')[0].rpartition('.')[2]}={one.partition('=')[2]}" for one in chosen
    )
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "-", "_".join(short))


def checked_config(options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """The configuration with an absolute run directory, known to name data that exist here.

    A mistake found now costs nothing; found by the job, it costs the wait in the queue.
    """
    path = options.config
    config = load_config(path, overrides)
    if config.run_dir is None:
        raise ConfigError(f"{path}: run_dir is missing; give it, as in run_dir=exp/first")
    if not config.data.training_shards:
        raise ConfigError(f"{path}: data.train is missing; give it, as in data.train=data/train")
    wanted = {
        "train": config.data.train,
        **{f"mixture.{name}.shards": part.shards for name, part in config.data.mixture.items()},
        "validation": config.data.validation,
    }
    for key, patterns in wanted.items():
        for pattern in patterns:
            require_data(f"data.{key}", pattern, options)
    return config.model_copy(update={"run_dir": os.path.abspath(config.run_dir)})


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=value", help="override a key of the file"
    )


def _process_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="of each host (default: 1 if there are any)"
    )
    parser.add_argument(
        "--procs-per-node", type=int, metavar="N", help="default: one for each GPU, else one"
    )
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
