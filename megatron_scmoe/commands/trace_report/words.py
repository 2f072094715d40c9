"""Numbers and names as a reader wants them."""

from math import log10

from megatron_scmoe.overlap.schedule import window


def duration(seconds: float) -> str:
    """Milliseconds with three significant digits or, from 100 ms, none behind the point."""
    return f"{_three_digits(seconds * 1e3)} ms"


def speed(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def size(number: float) -> str:
    """Bytes in powers of 1000."""
    if number < 1000:
        return f"{number:.0f} B"
    power = min(int(log10(number) / 3), 4)
    return f"{_three_digits(number / 1000**power)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def percent(share: float) -> str:
    return f"{share:.1%}"


def change(value: float, reference: float) -> str:
    """How much more a value is, with its sign."""
    share = value / reference - 1 if reference else 0.0
    return f"{share:+.1%}" if abs(share) >= 0.0005 else "0.0%"


def _three_digits(number: float) -> str:
    rounded = float(f"{number:.3g}")  # 9.999 is 10.0
    return f"{number:.{0 if rounded >= 100 else 1 if rounded >= 10 else 2}f}"


def step_name(step: str) -> str:
    """A step in words; attention of the dense layer is told from that of the MoE layer."""
    if step.startswith("dense_") and step != "dense_mlp":
        return f"dense {step_name(step.removeprefix('dense_'))}"
    return {"qkv": "QKV", "dense_mlp": "MLP"}.get(step, step.replace("_", " "))


def slot_name(position: str, slot: int) -> str:
    """Where a slot is, in the words of the window; true of both directions."""
    operators = [step_name(step.value) for step in window(position)]
    if slot == 0:
        return f"before {operators[0]}"
    if slot == len(operators):
        return f"after {operators[-1]}"
    return f"between {operators[slot - 1]} and {operators[slot]}"


def numbers(values: tuple[int, ...]) -> str:
    """1, 2, 3, 5 as 1-3, 5."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
