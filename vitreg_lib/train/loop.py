"""The training loop: one function for all recipes.

A recipe is a file (see `recipes`) with these functions:

    build(config) -> nn.Module                   the module that is trained
    loss(module, config, step, device) -> (loss, {name: tensor})    scalars, for the log
    evaluate(module, config, device) -> {name: number}        without gradients or dropout
    backbone(module) -> nn.Module                the timm ViT inside, which is measured and saved

and, optionally:

    telemetry_images(config) -> Tensor           images for telemetry; by default `images.telemetry_images`
    after_step(module, config, step)             work after an optimiser step, such as a teacher's update
    companions(module) -> {name: state}          states saved beside the backbone
    SEPARABLE = False                            the loss compares the images of a batch with each other
    GRAPH = True                                 without --data the loss depends on the step by `parallel.positions`
                                                 alone, has fixed shapes and never waits for a GPU

The number of a step determines its batch; every process computes its part (see `parallel`). The random state is set
from (seed, step) at every step. A resumed run therefore ends with the same weights as an uninterrupted one, on a CPU
bit for bit. `state` describes the folder of a run; a finished run adds model.safetensors and result.json.

A GPU is not waited for: a step's numbers are read while it computes the next one. With GRAPH, a step is one CUDA graph,
since at mini sizes the launches of its kernels take longer than the kernels.
"""

import json
import math
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import torch

from ..base import UserError, line, unknown, write_atomically
from ..model.weights import write_safetensors
from . import graph, images, parallel, recipes, state, telemetry
from .config import TrainConfig
from .graph import Numbers
from .state import Run


def train(
    config: TrainConfig,
    recipe: ModuleType,
    folder: str | Path,
    device: str = "cpu",
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> dict:
    """The result, as a dictionary, of training to `config.steps`, resumed from the folder's state if it has one.

    The stop button, Ctrl-C and SIGTERM let the step end, save the state and raise KeyboardInterrupt, whose message says
    how to resume. Ranks other than 0 write nothing, and their result is empty. Raises UserError where the folder holds
    a run of another configuration or the state cannot be read or written, and FloatingPointError when the loss is no
    longer finite (on a GPU a step later). The last good state is always kept.
    """
    folder = Path(folder)
    _check(config, recipe)
    torch.manual_seed(config.seed)
    module = recipe.build(config).to(device)  # refuses an unknown size before a folder is made
    if parallel.rank() == 0:
        state.claim(folder, config)
    parallel.barrier()
    run, began = prepare(module, recipe, config, device), time.perf_counter()
    state.load(folder, run)
    run.loss = parallel.distribute(run.loss, config)
    _fit(run)
    _take_steps(run, folder, progress, on_step)
    result = _finish(folder, run, began)
    parallel.barrier()
    return result


def _take_steps(run: Run, folder: Path, progress: bool, on_step) -> None:
    """Take the steps from `run.step` to the last; measure norms and save the state along the way and at the end."""
    from tqdm.auto import tqdm

    config, start, unread, replay, stop = run.config, run.step, deque(), None, False
    watched = getattr(run.recipe, "telemetry_images", images.telemetry_images)(config)
    measured_at = set(telemetry.measured_steps(config.steps))

    def read(all_but: int = 0) -> bool:
        """Put the numbers of steps into the log; return whether one asks to stop."""
        return any([_note(run, *unread.popleft(), folder, on_step) for _ in range(len(unread) - all_but)])

    hidden = not progress or parallel.rank() > 0
    with _stop_button() as asked, _tensor_cores(run.device):
        for step in tqdm(range(start, config.steps), initial=start, total=config.steps, disable=hidden, desc="steps"):
            if step in measured_at:
                _measure(run, watched)
            if step > start and step % config.save_every == 0:
                stop |= read()
                state.save(folder, run)
            if step == start + 1 and graph.possible(run):
                replay = capture(run, step)
            unread.append((step, take_step(run, step, asked, replay)))
            stop |= read(all_but=int(run.on_gpu))
            if stop or (parallel.world() == 1 and asked()):
                read()
                state.save(folder, run)
                raise KeyboardInterrupt(
                    f"stopped after step {run.step} of {config.steps}; go on with: vitreg train --resume {folder}"
                )
    read()
    _measure(run, watched)
    state.save(folder, run)


def _measure(run: Run, watched: torch.Tensor) -> None:
    """Add the norms on the images `watched` to `run.norms`."""
    if (whole := parallel.whole(run.module, run)) is not None:
        with parallel.eager(run.config):
            run.norms.append(telemetry.measure(run.recipe.backbone(whole), watched, run.step))


def configure(recipe: str, **options) -> tuple[TrainConfig, ModuleType]:
    """The configuration of a recipe, by name or path, with `options` in place of its defaults, and its module."""
    kind = recipes.config_class(recipe, options.get("data", ""))
    names = [f.name for f in fields(kind)]
    for name in options:
        if name not in names:
            raise unknown(f"option of {recipe}", name, names)
    return kind(**options), recipes.load(recipe, options.get("data", ""))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def _check(config: TrainConfig, recipe) -> None:
    if config.steps < 1:
        raise UserError(f"--steps {config.steps}: at least one is needed")
    if config.accumulate > 1 and not _separable(recipe):
        raise UserError(
            f"--accumulate {config.accumulate}: {config.name} compares the images of a batch with each other, "
            "so parts of it have another loss; use more processes (torchrun) or a smaller --batch-size"
        )
    share = len(parallel.batch_range(config, 0))  # refuses a batch that does not split over the processes
    if config.accumulate > share:
        raise UserError(f"--accumulate {config.accumulate}: a process has only {share} images a step")


def _separable(recipe) -> bool:
    return getattr(recipe, "SEPARABLE", True)


def prepare(module: torch.nn.Module, recipe, config: TrainConfig, device: str) -> Run:
    """The run at step 0."""
    ema = None
    if config.ema:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(module, decay=config.ema)
    if config.compile:
        parallel.compile_blocks(module, device)
    loss = parallel.Loss(module, recipe, config, device)
    if config.fsdp:
        parallel.shard(loss)
        if ema is not None:
            parallel.shard(ema.module)
    optimizer = parallel.optimizer(module, config, device)
    return Run(recipe, config, device, module, loss, optimizer, ema, config.accumulate)


def take_step(run: Run, step: int, asked=lambda: False, replay=None) -> Numbers:
    """One optimiser step; its numbers, with `loss` and, of several processes, `stop` (above 0: one was asked to).

    replay: the step as a CUDA graph, by `capture`. Where the loss is not finite, nothing is changed, except on a GPU,
    which is not waited for.
    """
    for group in run.optimizer.param_groups:
        rate = learning_rate(run.config, step) * group.get("lr_scale", 1.0)
        group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate
    run.module.train()
    if replay:
        torch.manual_seed(_seed(run.config, step, stream=0))
        numbers = Numbers(*replay(step))
    else:
        names, values = _gradients_that_fit(run, step, asked)
        numbers = Numbers(names, values)
        if not values.is_cuda and not values[0].isfinite():
            return numbers
        _update(run)
    if hasattr(run.recipe, "after_step"):
        run.recipe.after_step(run.module, run.config, step)
    if run.ema is not None:
        run.ema.update(run.module, step=step)
    run.step = step + 1
    return numbers


def capture(run: Run, step: int) -> Callable[[int], tuple]:
    """The gradients and the optimiser's step as one CUDA graph: step → (names, values) of its numbers."""

    def take():
        numbers = gradients(run, step)
        _update(run)
        return numbers

    run.module.train()
    run.optimizer.zero_grad(set_to_none=True)
    return graph.capture(take, run.config, step, run.device)


def _update(run: Run) -> None:
    """The optimiser's step from the gradients."""
    if run.config.clip_grad:
        torch.nn.utils.clip_grad_norm_(run.module.parameters(), run.config.clip_grad)
    run.optimizer.step()


def _note(run: Run, step: int, numbers: Numbers, folder: Path, on_step) -> bool:
    """Put a step's numbers into the log; return whether a process, or `on_step` by KeyboardInterrupt, asks to stop.

    Raises FloatingPointError where the loss is not finite.
    """
    values = numbers.read()
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"loss is {values['loss']} at step {step}; the last good state is kept in {folder}. "
            "A smaller --learning-rate or a longer --warmup may help, in another folder"
        )
    stop = bool(values.pop("stop", False))
    run.log.append({"step": step, **values})
    try:
        if on_step:
            on_step(step, values["loss"])
    except KeyboardInterrupt:
        stop = True
    return stop


def _gradients_that_fit(run: Run, step: int, asked) -> tuple[list[str], torch.Tensor]:
    """`gradients`, in smaller micro-batches where memory runs out."""
    while True:
        try:
            return gradients(run, step, asked)
        except torch.OutOfMemoryError as error:
            reason = line(error)
        # outside of the handler, which would keep the failed step's tensors alive
        if parallel.world() > 1:  # the other processes are waiting for this one's gradients
            more = f"go on with --resume and --accumulate {2 * run.accumulate}" if _separable(run.recipe) else ""
            raise UserError(f"out of memory at step {step} ({reason}): {more or 'use more processes'}")
        _halve(run, step, reason)


def gradients(run: Run, step: int, asked=lambda: False) -> tuple[list[str], torch.Tensor]:
    """Compute the gradients of the whole batch, micro-batch by micro-batch; return names and values of its numbers."""
    run.optimizer.zero_grad(set_to_none=True)
    share = run.config.batch_size // parallel.world()
    total = 0.0
    for part in range(run.accumulate):
        if not parallel.capturing():  # a graph draws from the state that is set before it is launched
            torch.manual_seed(_seed(run.config, step, parallel.rank() * run.accumulate + part))
        with parallel.micro_batch(part, run.accumulate):
            weight = len(parallel.batch_range(run.config, step)) / share
            with parallel.without_sync(run.loss, last=part == run.accumulate - 1):
                value, numbers = run.loss(step)
                (value * weight).backward()
        numbers = {"loss": value.detach()} | numbers
        total = total + weight * torch.stack([n.to(run.device, torch.float64) for n in numbers.values()])
    if parallel.world() == 1:
        return [*numbers], total
    sums = parallel.all_reduce_sum(torch.cat([total, total.new_tensor([float(asked())])]))
    return [*numbers, "stop"], sums / parallel.world()


def _seed(config: TrainConfig, step: int, stream: int) -> int:
    """Seed of the random state of a step; it differs between seeds, processes and micro-batches.

    It fits into 32 bits, because the CPU's generator takes no more.
    """
    return (config.seed * 0x9E3779B1 + step + stream * 0x7F4A7C15) % 2**32


def _fit(run: Run) -> None:
    """Under DDP: halve the micro-batches until one fits on every rank.

    A rank that runs out of memory in a step leaves the others waiting for its gradients. All ranks therefore try the
    first micro-batch before the training, without an exchange of gradients, and halve if one of them must.
    """
    if parallel.world() == 1 or run.config.fsdp or not _separable(run.recipe):
        return
    run.module.train()
    while True:
        reason = ""
        try:
            with parallel.micro_batch(0, run.accumulate), parallel.without_sync(run.loss, last=False):
                run.loss(run.step)[0].backward()
        except torch.OutOfMemoryError as error:
            reason = line(error)
        run.optimizer.zero_grad(set_to_none=True)
        if not parallel.all_reduce_sum(torch.tensor(float(bool(reason)), device=run.device)):
            return
        _halve(run, run.step, reason or "on another process")


def _halve(run: Run, step: int, reason: str) -> None:
    """Double the number of micro-batches, at half the size. Raises UserError where that cannot help or changes the
    loss."""
    run.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not _separable(run.recipe):
        raise UserError(
            f"out of memory at step {step} ({reason}), and {run.config.name} needs its whole batch at once: "
            "use more processes (torchrun), a smaller --batch-size or --size"
        )
    if 2 * run.accumulate > run.config.batch_size // parallel.world():
        raise UserError(f"out of memory at step {step} with one image ({reason}): choose a smaller --size")
    run.accumulate *= 2
    warnings.warn(
        f"out of memory at step {step}: going on with {run.accumulate} micro-batches of half the size; "
        f"the batch of {run.config.batch_size} images stays",
        stacklevel=2,
    )


@contextmanager
def _stop_button():
    """A context that only notes the first SIGINT or SIGTERM, so that a step ends completely; the second one acts.

    It yields a function that returns whether there was one. Outside the main thread, signals act as always.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signals = []

    def note(number, frame):
        signals.append(number)
        signal.signal(number, before[number] or signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _tensor_cores(device):
    """A context in which a GPU computes what autocast leaves in float32 with its tensor cores too, less precisely."""
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _finish(folder: Path, run: Run, began: float) -> dict:
    """Measure the trained module (its moving average, if any), write weights and result, and return the result."""
    recipe, config = run.recipe, run.config
    whole = parallel.whole(run.ema.module if run.ema else run.module, run)
    if whole is None:
        return {}
    with parallel.eager(config), torch.no_grad():
        measured = recipe.evaluate(whole.eval(), config, run.device)
    result = {
        **measured,
        "steps": config.steps,
        "images": config.steps * config.batch_size,
        "parameters": measured.get("parameters", sum(p.numel() for p in whole.parameters())),
        "seconds_of_last_session": round(time.perf_counter() - began),
    }
    settings = {"config": json.dumps(asdict(config))}
    state.save_weights(folder / "model.safetensors", recipe.backbone(whole), settings)
    for name, tensors in recipe.companions(whole).items() if hasattr(recipe, "companions") else ():
        half = {k: v.half() for k, v in tensors.items()}
        write_safetensors(folder / f"model.{name}.safetensors", half, settings)
    write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    return result
