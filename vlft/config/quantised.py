"""Flags of quantised bases: `--bits`, `--quant_type` and `--double_quant`. Imports nothing heavy.

Neighbours: `vlft.config.checks` calls `problems` before anything is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlft.config.values import Values


def problems(values: Values, verb: str) -> Iterator[str]:
    """Yield a message for each combination of these flags with others that cannot be carried out."""
    bits = str(values.of("bits"))
    if bits != "4" and not (values.given("adapter") and not values.given("bits")):  # the adapter may decide it
        for flag, default in (("quant_type", "nf4"), ("double_quant", True)):  # a run's config.yaml holds defaults
            if values.given(flag) and values.of(flag) != default:
                word = str(values.of(flag)).lower()
                yield (
                    f"--{flag} {word} has no effect with --bits {bits}: it is a setting of --bits 4. Drop one of the "
                    "two."
                )
    if bits == "16":
        return
    if verb == "bench":
        yield f"--bits {bits}: vlft bench compares with a trainer of 16 bits. Drop it, or use vlft train."
        return
    decided = values.given("adapter") and not values.given("language")
    if (language := values.of("language")) != "lora" and not decided:
        reason = "quantised weights cannot be trained" if language == "full" else "only an adapter is merged into them"
        yield f"--bits {bits} with --language {language}: {reason}. Use --language lora, or drop --bits."
    if values.given("deepspeed"):
        from vlft.config.deepspeed import names_zero3

        if names_zero3(str(values.of("deepspeed"))):
            yield cannot_share(f"--bits {bits}", str(values.of("deepspeed")))


def cannot_share(what: str, deepspeed: str) -> str:
    """Why quantised weights do not go with ZeRO-3, as a message that begins with `what`."""
    return (
        f"{what} with --deepspeed {deepspeed}: ZeRO-3 splits weights over the processes, and cannot split packed ones. "
        "Use --deepspeed zero2, or no --deepspeed; each GPU then holds the quantised model."
    )
