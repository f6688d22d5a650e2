"""The training loop: steps, evaluation, log, checkpoints; the same for every task and every strategy."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import averaging, checkpoint, strategies, tasks
from .launch import World
from .log import Log, Progress
from .options import fixed
from .schedules import learning_rate, note_on_warmup, total_steps


class Run:
    """One training run on this rank.

    Args:
        options: the command line (options.py).
        world: the ranks.
    """

    def __init__(self, options: Any, world: World) -> None:
        self.options, self.world = options, world
        seed_all(options.seed)
        share = tasks.Share(world.rank, world.size, options.batch_size, options.seed)
        self.task = tasks.make(options, share, world.device)
        self.numel = sum(p.numel() for p in self.task.model.parameters() if p.requires_grad)
        self.strategy = strategy_of(self.task.model, options, world, self.task.steps_per_epoch)
        self.total = total_steps(options, self.task.steps_per_epoch)
        if world.is_main and (note := note_on_warmup(options, self.task.steps_per_epoch)):
            print(note, file=sys.stderr)
        self.done = 0
        self.carry = self.task.start()
        self.evaluation: dict[str, float] = {}
        seed_all(options.seed * 1009 + world.rank + 1)  # dropout differs between ranks, the start does not
        self._pending: list[tuple[int, list[float], list[float]]] = []
        self._sums = {"bytes_sent": 0.0, "bytes_received": 0.0, "step_time_s": 0.0, "steps": 0}
        self._train_loss: list[float] = []
        resumed = self._resume() if options.resume else False
        self.log = Log(options.log if world.is_main else None, self.done if resumed else None)
        if not resumed:
            self._describe()

    def train(self, after_step: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Trains to the end (or to --stop-after) and returns the summary, the same on all ranks.

        Args:
            after_step: is called with the number of steps behind each of them, on all ranks.
        """
        options = self.options
        title = f"{options.scheme} {options.task}/{options.model}"
        bar = Progress(self.total, self.done, title, self.world.is_main and not options.quiet)
        started = time.perf_counter()
        end = min(self.total, options.stop_after or self.total)
        while self.done < end:
            loss = self._step()
            bar.step(f"loss {loss:.3f} " + self._score())
            ends_epoch = self.done % self.task.steps_per_epoch == 0
            if ends_epoch or self.done == end or self.done % options.log_every == 0:
                self._flush()
            if ends_epoch or self.done == self.total:
                self._evaluate()
            if self._due(ends_epoch, end):
                self._save()
            after_step(self.done)
        bar.close()
        summary = self._summary(time.perf_counter() - started)
        if self.done == self.total:
            summary |= self._sample()
            self.log.write("end", **summary)
        self.log.close()
        self.strategy.close()
        return summary

    def _step(self) -> float:
        epoch, step = divmod(self.done, self.task.steps_per_epoch)
        if step == 0:
            self.carry = self.task.start()
        lr = learning_rate(self.options, self.done, self.total, self.task.steps_per_epoch)
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = lr
        self.strategy.model.train()
        carried: list[Tensor | None] = []

        def compute(model: nn.Module) -> Tensor:
            loss, carry = self.task.loss(model, epoch, step, self.carry)
            carried.append(carry)
            return loss

        started = time.perf_counter()
        loss = float(self.strategy.step(compute))
        elapsed_s = time.perf_counter() - started
        self.carry = carried[-1]
        self.done += 1
        info = self.strategy.info()
        delta = math.nan if info.delta is None else info.delta
        norm = math.nan if info.residual_norm is None else info.residual_norm
        self._pending.append(
            (self.done, [loss, info.bytes_sent, info.bytes_received, delta, norm], [elapsed_s, lr])
        )
        return loss

    def _flush(self) -> None:
        """Writes the pending steps, averaged over ranks; a collective call."""
        if not self._pending:
            return
        means = self.world.mean(torch.tensor([row for _, row, _ in self._pending], dtype=torch.float64))
        busiest = torch.tensor([[times[0], row[1]] for _, row, times in self._pending], dtype=torch.float64)
        for (step, _, (_, lr)), mean, most in zip(
            self._pending, means.tolist(), self.world.max(busiest).tolist()
        ):
            loss, sent, received, delta, norm = mean
            self._sums["bytes_sent"] += sent
            self._sums["bytes_received"] += received
            self._sums["step_time_s"] += most[0]
            self._sums["steps"] += 1
            self._train_loss.append(loss)
            self.log.write(
                "step",
                step=step,
                epoch=(step - 1) // self.task.steps_per_epoch,
                loss=loss,
                lr=lr,
                bytes_sent=sent,
                bytes_received=received,
                bytes_sent_max=most[1],
                step_time_s=most[0],
                delta=None if math.isnan(delta) else delta,
                residual_norm=None if math.isnan(norm) else norm,
            )
        self._pending.clear()

    def _evaluate(self) -> None:
        """Test loss and accuracy with rank 0's buffers (DDP broadcasts them at each forward pass as well)."""
        loss, correct, count = self.held_out(self.task)
        self.evaluation = {"test_loss": loss / count, "test_accuracy": correct / count}
        if self.options.task in ("text", "ptb"):
            self.evaluation["test_perplexity"] = math.exp(min(50.0, loss / count))
        epoch = self.done // self.task.steps_per_epoch
        train_loss = sum(self._train_loss) / len(self._train_loss)
        self.log.write("epoch", epoch=epoch, step=self.done, train_loss=train_loss, **self.evaluation)
        self._train_loss.clear()

    def held_out(self, task: tasks.Task) -> list[float]:
        """Summed loss, right answers and their number, of `task`'s held-out data; a collective call."""
        with self.strategy.evaluating():
            for buffer in self.task.model.buffers():
                dist.broadcast(buffer, 0)
            self.task.model.eval()
            sums = self.world.sum(task.evaluate(self.task.model)).tolist()
            self.task.model.train()
        return list(sums)

    def _sample(self) -> dict[str, str]:
        """A text that the trained model writes; a collective call. Nothing where none is asked for."""
        if not self.options.sample:
            return {}
        with self.strategy.evaluating():
            return {"sample": self.task.sample(self.options.sample)}

    def _due(self, ends_epoch: bool, end: int) -> bool:
        options = self.options
        if options.checkpoint is None:
            return False
        every = options.checkpoint_every
        return (self.done % every == 0 if every else ends_epoch) or self.done == end

    def _save(self) -> None:
        self._flush()
        model = {
            "model": self.task.model.state_dict(),
            "optimizer": self.strategy.optimizer.state_dict(),
        }
        common = {
            "options": fixed(self.options),
            "evaluation": self.evaluation,
            "sums": dict(self._sums),
            "train_loss": list(self._train_loss),
        }
        mine = {
            "random": checkpoint.random_state(self.world.device),
            "strategy": self.strategy.state_dict(),
            "carry": self.carry,
        }
        (common if self.strategy.replicated else mine).update(model)
        checkpoint.save(Path(self.options.checkpoint), self.done, self.world, common, mine)

    def _resume(self) -> bool:
        found = checkpoint.load(Path(self.options.checkpoint), self.world)
        if found is None:
            return False
        common, parts = found
        checkpoint.check_options(common["options"], fixed(self.options))
        same_size = common["world_size"] == self.world.size
        if not same_size and self.carry is not None:
            raise ValueError(f"this run cannot go from {common['world_size']} ranks to {self.world.size}")
        if not same_size and not self.strategy.replicated:
            parts = averaged(parts)
        self.strategy.model.train()
        # the layout first (this moves buffers and generators), the state afterwards
        self.strategy.prime(lambda model: self.task.loss(model, 0, 0, self.task.start())[0])
        source = common if self.strategy.replicated else parts[0]
        self.task.model.load_state_dict(source["model"])
        self.strategy.optimizer.load_state_dict(source["optimizer"])
        self.strategy.load_state_dict([part["strategy"] for part in parts])
        mine = parts[0] if same_size else parts[self.world.rank % len(parts)]
        self.carry = None if mine["carry"] is None else mine["carry"].to(self.world.device)
        self.done, self.evaluation = common["step"], common["evaluation"]
        self._sums, self._train_loss = common["sums"], common["train_loss"]
        checkpoint.set_random_state(mine["random"], self.world.device)
        return True

    def _describe(self) -> None:
        self.log.write(
            "start",
            options=vars(self.options),
            ranks=self.world.size,
            launcher=self.world.launcher,
            parameters=self.numel,
            steps_per_epoch=self.task.steps_per_epoch,
        )

    def _score(self) -> str:
        if "test_perplexity" in self.evaluation:
            return f"perplexity {self.evaluation['test_perplexity']:.2f}"
        return f"accuracy {self.evaluation['test_accuracy']:.4f}" if self.evaluation else ""

    def _summary(self, elapsed_s: float) -> dict[str, Any]:
        steps = max(1, self._sums["steps"])
        sent = self._sums["bytes_sent"] / steps
        dense = 4.0 * self.numel
        plain_ddp = self.options.scheme == "dense" and self.options.averaging == "none"
        return {
            "scheme": self.options.scheme,
            "averaging": averaging_of(self.options),
            "transport": "ddp" if plain_ddp else self.options.transport,
            "error_feedback": self.options.error_feedback,
            "density": self.options.density if self.options.scheme != "dense" else 1.0,
            "ranks": self.world.size,
            "step": self.done,
            **self.evaluation,
            "bytes_sent_per_step": sent,
            "bytes_received_per_step": self._sums["bytes_received"] / steps,
            "gradient_bytes": dense,
            "step_time_s": self._sums["step_time_s"] / steps,
            "elapsed_s": elapsed_s,
        }


def strategy_of(model: nn.Module, options: Any, world: World, steps_per_epoch: int) -> strategies.Strategy:
    """How the options have gradients reduced or models averaged."""
    if options.averaging == "stagewise":
        return averaging.Staged(model, options, world, steps_per_epoch)
    if options.averaging != "none":
        return averaging.Averaged(model, options, world, steps_per_epoch)
    return strategies.STRATEGIES[options.scheme](model, options, world, steps_per_epoch)


def averaging_of(options: Any) -> str:
    """How rarely models are averaged, in words: "none", "local, every 8 steps"."""
    words = [options.averaging]
    if options.averaging == "decentralized":
        words.append(options.topology)
    if options.averaging == "local" and options.sync != "every":
        words.append(options.sync)
    elif options.averaging not in ("none", "stagewise"):
        words.append("every step" if options.period == 1 else f"every {options.period} steps")
    if options.wire_bits is not None:
        words.append(f"{options.wire_bits} bit{'s' if options.wire_bits > 1 else ''} an element")
    if options.averaging_start:
        words.append(f"after step {options.averaging_start}")
    return ", ".join(words)


def averaged(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts whose models, optimizers and averagers are the ranks' average, for a run with another world size."""
    from commhooks.averaging import average_checkpoints

    joined = average_checkpoints([{k: part[k] for k in ("model", "optimizer", "strategy")} for part in parts])
    return [{**part, **joined} for part in parts]


def seed_all(seed: int) -> None:
    """Seeds torch's, numpy's and Python's generators."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)
