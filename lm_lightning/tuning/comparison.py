"""The table of `verify`: the differences between the metrics of each variant and those of its base."""

from lm_lightning.tuning.variants import VARIANTS, Differences, Outcome


def differences(outcome: Outcome, base: Outcome) -> Differences:
    """The differences between the logged metrics of a variant and those of its base."""
    norms = [abs(a - b) / b for a, b in zip(outcome.gradient_norms, base.gradient_norms)]
    losses = [abs(a - b) for a, b in zip(outcome.losses, base.losses)]
    return Differences(norms[0], max(norms), max(losses))


def comparison_table(outcomes: dict[str, Outcome], steps: int) -> tuple[str, bool]:
    """The table with its legend, as Markdown, and whether all variants in it are within their tolerance."""
    head = ["variant", "processes", "micro-batches", "first gradient", "gradient", "loss", "tokens/s", "GiB", "result"]
    rows, notes, good = [head], [], True
    for name, outcome in outcomes.items():
        variant = VARIANTS[name]
        nodes = f"{variant.nodes} nodes x " if variant.nodes > 1 else ""
        row = [name, f"{nodes}{variant.processes}", str(variant.micro_batches)]
        if outcome.reason:
            result = "failed" if outcome.failed else "not run"
            notes.append(f"- {name} {result}: {outcome.reason}")
            good = good and not outcome.failed
            rows.append([*row, "", "", "", "", "", result])
            continue
        found, result = ["", "", ""], "base"
        if variant.base is not None:
            distance = differences(outcome, outcomes[variant.base])
            within = all(value <= limit for value, limit in zip(distance, variant.tolerance))
            good = good and within
            found = [f"{value:.1e}" for value in distance]
            result = f"{'within' if within else 'OUTSIDE'} {', '.join(f'{limit:g}' for limit in variant.tolerance)}"
        memory = "" if outcome.memory is None else f"{outcome.memory:.2f}"
        rows.append([*row, *found, f"{outcome.tokens_per_second:,.0f}", memory, result])
    legend = (
        f"Largest differences from the plain run (of documents: from documents_eager) in {steps} steps: relative "
        "differences of the gradient norm (at the first step, before the optimizer amplifies rounding errors, and at "
        "any step), and differences of the loss in nats per token. Tokens/s is the value of the median step, GiB the "
        "peak memory of the first process."
    )
    return "\n".join([*markdown(rows), "", legend, *([""] if notes else []), *notes]), good


def markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns; the first and last columns are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    words = (0, len(widths) - 1)
    rule = ["-" * width if i in words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [rows[0], rule, *rows[1:]]
    aligned = [[c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))] for r in lines]
    return [f"| {' | '.join(cells)} |" for cells in aligned]


def machine(outcomes: dict[str, Outcome]) -> str:
    """One line on hardware and versions."""
    environment = next((outcome.environment for outcome in outcomes.values() if outcome.environment), None)
    if environment is None:
        return "Nothing has run"
    hardware = environment["gpus"] or [f"CPU with {environment['threads']} threads"]
    versions = [f"{name} {environment[name]}" for name in ("python", "torch", "lightning", "transformers")]
    return ", ".join([environment["platform"], *hardware, *versions])
