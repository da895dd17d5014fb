"""Capabilities of strategies, which the rest of the project checks instead of their classes.

A strategy states its capabilities as class attributes; those that it omits have the defaults of `Capabilities`. So
your own strategy needs no entry anywhere: with `averages_gradients = True`, it can be chosen by its `class_path`.

A strategy may also have these methods:

- `check_processes()` refuses devices, nodes and plugins that it cannot use, with a `UserError`, before processes start.
- `check(config)` refuses networks by their `PreTrainedConfig`, before their weights are created.
- `throughput_metrics()` returns additional metrics for `Throughput`: numbers by their names, such as
  `train/compilations`.
"""

from dataclasses import dataclass, fields

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of a strategy, with defaults for those that it does not state.

    Args:
        averages_gradients: After the backward pass, `grad` of each parameter is the mean over all processes of the
            gradients of their losses, and it can be scaled in place: `LanguageModule` converts it to the mean over all
            tokens. A strategy without it is refused. Lightning's strategies for one device and for DDP have it.
        shards_parameters: A process holds only a part of each parameter, as a `DTensor`.
        splits_matrices: Several processes compute each matrix product together, so that the outputs of a layer, and the
            parameters of a head, are incomplete in each of them.
        quantized_weights: Parameters may be of bitsandbytes' data types.
        lazy: Operations are recorded and compiled, once for each combination of shapes, as XLA does. Reading a value in
            the middle of a step makes the host wait, and changing shapes are expensive.
    """

    averages_gradients: bool = False
    shards_parameters: bool = False
    splits_matrices: bool = False
    quantized_weights: bool = True
    lazy: bool = False


def capabilities(strategy: Strategy) -> Capabilities:
    """The capabilities that a strategy states, else the defaults."""
    stated = {f.name: getattr(strategy, f.name) for f in fields(Capabilities) if hasattr(strategy, f.name)}
    known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))  # of Lightning
    return Capabilities(**({"averages_gradients": known} | stated))
