"""Names of floating-point dtypes, short ones included."""

from __future__ import annotations

from yopo.support.errors import ModelError

SHORT = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}
"""Short names, as other tools write them."""

USUAL = ("float32", "bfloat16", "float16", "float64")
"""What models are run in; ``torch_dtype`` takes any other that torch has, too."""


def check_dtype(name: str) -> None:
    """Refuse a name that is certainly no dtype, without torch.

    Raises:
        ModelError: It is unknown.
    """
    if full_name(name) not in ("auto", *USUAL) and not name.startswith("float8"):
        raise unknown_dtype(name)


def unknown_dtype(name: str) -> ModelError:
    """The error for a name that is no dtype."""
    return ModelError(
        f"Unknown dtype '{name}'.", remedy="Use float32, bfloat16 (bf16) or float16 (fp16)."
    )


def full_name(name: str) -> str:
    """The name of a dtype in torch: ``bfloat16`` for ``bf16``."""
    return SHORT.get(name.lower(), name)
