"""liger-kernel: its kernels for a network that exists already."""

from typing import Any

from lm_lightning.errors import package

WHAT = "the callback LigerKernels"


def liger_types() -> list[str]:
    """The types of networks that Liger has kernels for, as in `config.model_type`.

    Alternative: none; Liger ignores other networks without an error.
    """
    return sorted(package("liger_kernel.transformers.monkey_patch", WHAT, "cuda").MODEL_TYPE_TO_APPLY_LIGER_FN)


def apply_liger(network: Any) -> None:
    """Makes a network use Liger's kernels, except for its loss.

    Liger lists this function in `__all__` despite its name. Alternative: `apply_liger_kernel` of
    `transformers.integrations.liger`, which calls it and is not in all supported versions.
    """
    liger = package("liger_kernel.transformers", WHAT, "cuda")
    liger._apply_liger_kernel_to_instance(model=network, cross_entropy=False, fused_linear_cross_entropy=False)
