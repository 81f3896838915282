"""The training loop. `_loop` reads in the order in which it runs."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial

from speechllm.checkpoint import Progress
from speechllm.config.load import dump_config
from speechllm.config.schema import Config
from speechllm.data.plan import EpochPlan
from speechllm.evaluate import evaluate
from speechllm.failure import FailureReport
from speechllm.garbage import CollectedBySteps
from speechllm.lease import lease_of_environment
from speechllm.log import logger, set_up_logging
from speechllm.model.positions import positions_of
from speechllm.optim import learning_rate, phase_of
from speechllm.planner.probe import probe
from speechllm.prepare import Split
from speechllm.report.status import State
from speechllm.run import Run, open_run, run_directory
from speechllm.run_lock import sole_run
from speechllm.step import StepResult, StepTotals, agree, refuse_too_many_bad, run_step
from speechllm.stop import StopSignals, deadline_of_environment
from speechllm.transfer import Transfer
from speechllm.types import Objective, StepData
from speechllm.world import World

DONE, STOPPED = 0, 99


def train(config: Config, world: World, *, probe_first: bool = False) -> int:
    """Train until `train.steps`, from the newest checkpoint in `run_dir` where there is one.

    Returns the exit code: 0 done, 99 stopped by a signal with a checkpoint written.
    Raises UserError subclasses for what the user can mend.
    """
    with ExitStack() as stack:
        directory = run_directory(config)
        set_up_logging(world.rank)
        # Outside StopSignals: while it waits there is nothing to save.
        leased = lease_of_environment() is not None
        stack.enter_context(sole_run(directory, world, leased=leased))
        stop = stack.enter_context(StopSignals(deadline=deadline_of_environment()))
        failures = FailureReport(directory / "failures", world, log=directory / "train.log")
        stack.enter_context(failures)
        run = open_run(config, world, stack)
        if probe_first:
            probe(run)
        return _loop(run, stop)


def _loop(run: Run, stop: StopSignals) -> int:
    config, progress, world = run.config, run.progress, run.world
    if reason := _finished(run):
        logger.info("nothing left to do: the run is at step %d; %s", progress.step, reason)
        _say(run, "done", reason)
        return DONE
    _say(run, "running")
    transfer = Transfer(world.device)
    steps_ahead = run.loader.steps(progress.epoch, progress.epoch_step)
    with closing(steps_ahead) as steps, CollectedBySteps() as garbage:
        clock = Clock()
        for data in steps:
            clock.data_arrived()
            phase = phase_of(progress.step, config.train)
            totals = agree(
                data, world, stop=stop.received is not None,
                positions_of=partial(positions_of, run.model, objective=phase.objective),
            )  # fmt: skip
            if totals.stop:
                _save(run)
                _wait_for_writer(run)
                reason = stop.received or "another rank's signal"
                _say(run, "saved", reason)
                logger.info("stopped by %s after step %d; run the same command again to go on",
                            reason, progress.step)  # fmt: skip
                return STOPPED
            plan = run.plan_of(data.epoch)
            _count_bad(run, data, totals, plan)
            lr = phase.lr_scale * learning_rate(phase.step, config.optim, phase.steps)
            result = run_step(
                run.strategy, data, totals, objective=phase.objective, lr=lr, seed=config.seed,
                step=progress.step, device=world.device, transfer=transfer,
            )  # fmt: skip
            _advance(progress, data, plan)
            logged = _due(run, config.train.log_every)
            found = _read(run, result, totals) if logged else None  # waits for the device
            garbage.collect(everything=logged)
            clock.step_done(totals)
            if found is not None:
                _log(run, data, totals, found, phase.objective, lr, clock)
            improved = False
            if run.validation is not None and _due(run, config.evaluation.every):
                improved = _evaluate(run, run.validation)
            if improved or _finished(run) or _due(run, config.train.checkpoint_every):
                _save(run)
            if reason := _finished(run):
                _wait_for_writer(run)
                logger.info("done after step %d; %s", progress.step, reason)
                _say(run, "done", reason)
                return DONE
            clock.restart()
    raise AssertionError("the loader is endless")


class Clock:
    """Where the time since the last logged step went, in seconds."""

    def __init__(self) -> None:
        self._clear()
        self._now = time.perf_counter()

    def restart(self) -> None:
        """Leave out what was done since the step: evaluation, the wait for a checkpoint."""
        self._now = time.perf_counter()

    def data_arrived(self) -> None:
        self._wait += self._lap()

    def step_done(self, totals: StepTotals) -> None:
        self._busy += self._lap()
        self._steps += 1
        self._utterances += totals.utterances
        self._audio += totals.audio_seconds

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading, and rates of the whole world."""
        spent = self._wait + self._busy
        values = {
            "step_seconds": spent / self._steps,
            "data_wait_seconds": self._wait / self._steps,
            "utterances_per_second": self._utterances / spent,
            "audio_seconds_per_second": self._audio / spent,
        }
        self._clear()
        return values

    def _clear(self) -> None:
        self._wait = self._busy = self._audio = 0.0
        self._steps = self._utterances = 0

    def _lap(self) -> float:
        before, self._now = self._now, time.perf_counter()
        return self._now - before


def _due(run: Run, every: int) -> bool:
    return run.progress.step % every == 0 or run.progress.step == run.config.train.steps


def _finished(run: Run) -> str | None:
    """Why the run is over; None: it is not."""
    steps, patience = run.config.train.steps, run.config.evaluation.patience
    if run.progress.step >= steps:
        return f"train.steps is {steps}"
    if 0 < patience <= (without := run.progress.evaluations_without_best):
        return f"{without} evaluations brought no new best, evaluation.patience is {patience}"
    return None


def _count_bad(run: Run, data: StepData, totals: StepTotals, plan: EpochPlan) -> None:
    for microbatch in data.microbatches:
        for bad in microbatch.bad:
            logger.warning("skipped %s in %s: %s", bad.key, bad.shard, bad.reason)
    run.progress.bad_in_epoch += totals.bad
    if totals.bad:
        refuse_too_many_bad(
            data,
            run.world,
            bad=run.progress.bad_in_epoch,
            epoch_utterances=plan.num_utterances,
            fraction=run.config.data.max_bad_fraction,
        )


def _advance(progress: Progress, data: StepData, plan: EpochPlan) -> None:
    progress.step += 1
    progress.epoch, progress.epoch_step = data.epoch, data.step + 1
    if progress.epoch_step == plan.num_steps:
        progress.epoch, progress.epoch_step, progress.bad_in_epoch = data.epoch + 1, 0, 0


@dataclass(frozen=True)
class _Found:
    """What a step came to, on the host. loss: nats a target token; None of it is this rank's."""

    loss: float
    token_accuracy: float
    grad_norm: float


def _read(run: Run, result: StepResult, totals: StepTotals) -> _Found:
    loss, correct = run.world.sum([float(result.loss), float(result.correct)])
    tokens = max(totals.target_tokens, 1)
    return _Found(loss / tokens, correct / tokens, float(result.grad_norm))


def _log(
    run: Run,
    data: StepData,
    totals: StepTotals,
    found: _Found,
    objective: Objective,
    lr: float,
    clock: Clock,
) -> None:
    if not math.isfinite(found.grad_norm):
        logger.warning("step %d: the gradient is not finite; no update", run.progress.step)
    if run.metrics is None:
        return
    rates = clock.read()
    values = {
        "step": run.progress.step,
        "epoch": data.epoch,
        "objective": objective,
        "loss": found.loss,
        "token_accuracy": found.token_accuracy,
        "lr": lr,
        "grad_norm": found.grad_norm,
        "target_tokens": totals.target_tokens,
        "utterances": totals.utterances,
        "audio_seconds": round(totals.audio_seconds, 3),
        "padding_fraction": totals.padding_fraction,
        "bad_utterances": totals.bad,
        **rates,
    }
    left = (run.config.train.steps - run.progress.step) * rates["step_seconds"]
    _say(run, "running", None, epoch=data.epoch, loss=found.loss, eta_seconds=left, **rates)
    run.metrics.training(values)
    run.line.update(values)


def _evaluate(run: Run, validation: Split) -> bool:
    """True where the score is among the `train.keep_best` best so far."""
    progress, rule = run.progress, run.config.evaluation
    scores = evaluate(run.model, validation, run.text, run.config, run.world)
    if run.metrics is not None:
        run.metrics.evaluation({"step": progress.step, "epoch": progress.epoch, **scores})
    logger.info(
        "step %d | validation %s",
        progress.step,
        " | ".join(f"{name} {value:.4g}" for name, value in scores.items()),
    )
    sign = -1 if rule.metric == "token_accuracy" else 1
    score = scores[rule.metric] if math.isfinite(scores[rule.metric]) else math.inf * sign
    entry = {"step": progress.step, "score": score}
    is_best = not progress.best or sign * score < sign * progress.best[0]["score"]
    progress.evaluations_without_best = 0 if is_best else progress.evaluations_without_best + 1
    ranked = sorted([*progress.best, entry], key=lambda e: (sign * e["score"], e["step"]))
    progress.best = ranked[: max(run.config.train.keep_best, 1)]
    return run.config.train.keep_best > 0 and entry in progress.best


def _save(run: Run) -> None:
    """Gathers on all ranks; rank 0 writes in the background."""
    state = run.strategy.full_state()
    if run.writer is not None:
        assert state is not None
        snapshot = replace(run.progress, best=list(run.progress.best))
        run.writer.save(state, snapshot, run.identity, dump_config(run.config))


def _say(run: Run, state: State, reason: str | None = None, **numbers: float) -> None:
    if run.status is not None:
        run.status.write(state, run.progress.step, reason=reason, **numbers)


def _wait_for_writer(run: Run) -> None:
    """All ranks: a launcher that sees one of them end with 99 soon kills the one that writes."""
    if run.writer is not None:
        run.writer.wait()
    run.world.barrier()
