"""`tune --find`: short runs that find a learning rate, or the largest micro-batch that fits into memory."""

import math
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from lm_lightning import files, yaml_text
from lm_lightning.errors import UserError
from lm_lightning.tuning.fit_process import fit, logged, newest_run, read_settings, shorten

# Output of a process that ran out of memory. Alternative: `torch.OutOfMemoryError`, which is for GPUs only, and which
# another process cannot catch.
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|MemoryError|DefaultCPUAllocator", re.I)


def learning_rate(fit_flags: list[str], low: float = 1e-6, high: float = 1.0, steps: int = 100) -> float:
    """Increases the learning rate at each step, and finds the one at which the loss falls fastest.

    Losses are smoothed (a moving average, corrected for its start), and the slope is the one of the loss over the
    logarithm of the learning rate, as in the finders of Lightning and fastai. The result is a starting point for a
    study: it depends on the batch size, and does not consider the end of a long run.

    Args:
        fit_flags: `--config` and any other flag of `fit`.
        low: Learning rate of the first step.
        high: Learning rate of the last step.
        steps: Number of optimizer steps.

    Returns:
        The learning rate.

    Raises:
        UserError: If the loss does not fall.
    """
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        settings = read_settings(fit_flags, folder)
        range_test = {"class_path": "lm_lightning.tuning.range_test.LearningRateRangeTest"}
        shorten(settings, steps, [range_test | {"init_args": {"low": low, "high": high}}])
        settings["trainer"] |= {"limit_val_batches": 0, "val_check_interval": 10**9}
        reason = short_run(settings, folder, "range-test")
        run = newest_run(folder / "runs", "range-test")
        losses, rates = logged(run, "train/loss"), logged(run, "train/learning_rate")
    points = [(rates[step], loss) for step, loss in sorted(losses.items()) if math.isfinite(loss)]
    if len(points) < 10:
        raise UserError(f"the run with different learning rates failed: {reason or 'too few steps were logged'}")
    found = steepest(points)
    option = "model.optimizer.init_args.lr"
    print(f"tried {len(points)} learning rates from {points[0][0]:.1e} to {points[-1][0]:.1e}")
    if found is None:
        raise UserError("the loss does not fall at any learning rate: check the data and the model first")
    print(f"the loss falls fastest at {found:.2g}: --{option} {found:.2g}")
    return found


def steepest(points: list[tuple[float, float]], smoothing: float = 0.8) -> Optional[float]:
    """The learning rate at which the smoothed loss falls fastest, before its minimum.

    Args:
        points: Ascending learning rates with losses.
        smoothing: Weight of the previous losses in the moving average.
    """
    average, smooth = 0.0, []
    for number, (_, loss) in enumerate(points, 1):
        average = smoothing * average + (1 - smoothing) * loss
        smooth.append(average / (1 - smoothing**number))
    least = smooth.index(min(smooth))
    logs = [math.log(rate) for rate, _ in points]
    slopes = [((smooth[i + 1] - smooth[i - 1]) / (logs[i + 1] - logs[i - 1]), points[i][0]) for i in range(1, least)]
    slope, rate = min(slopes, default=(0.0, 0.0))
    return rate if slope < 0 else None


def batch_size(fit_flags: list[str], memory: Optional[float] = None) -> int:
    """Finds the largest micro-batch that fits into memory and divides the batch of an optimizer step.

    Each size is tried in a run of three optimizer steps of two micro-batches, with a validation, in its own processes,
    so that running out of memory does not end this process, and all processes of a strategy agree. Sizes are doubled
    until one does not fit, then found by bisection. If samples differ in length, leave a margin for longer ones.

    Args:
        fit_flags: `--config` and any other flag of `fit`.
        memory: GiB that each process may use; None for all memory of the device.

    Returns:
        Number of samples per micro-batch and process.

    Raises:
        UserError: If not even one sample fits, or a run fails for another reason.
    """
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        settings = read_settings(fit_flags, folder)
        data, trainer = settings["data"]["init_args"], settings["trainer"]
        if "batch_size" not in data:
            raise UserError(
                f"{settings['data']['class_path']} has no option batch_size, which --find batch_size sets: add one"
            )
        samples = data["batch_size"] * trainer["accumulate_grad_batches"]  # samples per optimizer step and process
        sizes = [size for size in range(1, samples + 1) if samples % size == 0]
        shorten(settings, 3, [])
        trainer["limit_val_batches"] = 1

        def fits(size: int) -> bool:
            accumulate = min(2, samples // size)
            data["batch_size"], trainer["accumulate_grad_batches"] = size, accumulate
            trainer["val_check_interval"] = 2  # the memory is logged in the third step
            name = f"batch-{size}"
            reason = short_run(settings, folder, name)
            used = max(logged(newest_run(folder / "runs", name), "train/memory").values(), default=None)
            # The reason is from one process, the file has the output of all processes.
            errors = reason + (folder / "err.txt").read_text(encoding="utf-8", errors="replace")
            if reason and not OUT_OF_MEMORY.search(errors):
                raise UserError(f"the run with a micro-batch of {size} samples failed: {reason}")
            if not reason and used is None and memory is not None:
                raise UserError("--memory cannot be used, as this device does not report its memory usage: omit it")
            good = not reason and (memory is None or used is None or used <= memory)
            usage = "out of memory" if reason else "memory unknown" if used is None else f"{used:.2f} GiB"
            print(f"micro-batch {size}: {usage}, {'fits' if good else 'does not fit'}", flush=True)
            return good

        found = largest(sizes, fits)
    if found is None:
        raise UserError("not even a micro-batch of one sample fits: use a smaller network or block, or more memory")
    flags = ["--data.batch_size", str(found), "--trainer.accumulate_grad_batches", str(samples // found)]
    print(f"largest micro-batch for the {samples} samples of a step: {shlex.join(flags)}")
    return found


def largest(sizes: list[int], fits: Callable[[int], bool]) -> Optional[int]:
    """The largest size that fits, if all smaller ones do: doubles until one does not, then bisects.

    Args:
        sizes: Candidates in ascending order.
        fits: Whether a size fits.
    """
    good, bad = -1, len(sizes)  # indices
    while bad - good > 1 and bad == len(sizes):
        least = 2 * sizes[good] if good >= 0 else 1
        index = next((i for i, size in enumerate(sizes) if i > good and size >= least), len(sizes) - 1)
        good, bad = (index, bad) if fits(sizes[index]) else (good, index)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(sizes[middle]) else (good, middle)
    return sizes[good] if good >= 0 else None


def short_run(settings: dict[str, Any], folder: Path, name: str) -> str:
    """Runs `fit` with the given settings, in `runs` of a folder, and returns the reason if it failed."""
    config = folder / "config.yaml"
    files.write_text(config, yaml_text.dump(settings))
    return fit(["--config", str(config), "--runs_dir", str(folder / "runs"), "--name", name], folder, 3600)[1]
