"""Numbers, sizes, times and events in the words that people read, for the terminal and for notebooks alike.

Promise: any value that a report may hold gives a text. Not done here, but for :func:`printable`: nothing is escaped;
whoever shows a text does that for the place it is shown in.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

__all__ = [
    "count_text",
    "event_text",
    "metric_text",
    "number_text",
    "place_rows",
    "printable",
    "receipt_rows",
    "seconds_text",
    "size_text",
    "stopping_text",
    "time_text",
    "weights_text",
]

Report = Mapping[str, Any]


def printable(value: object) -> str:
    """Any text with what is no print shown escaped: control characters, and halves of characters, which no file has."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in str(value)
    )


def size_text(size: float) -> str:
    """A size in bytes as people read it: three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def count_text(number: int, noun: str) -> str:
    """A number of things: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def number_text(value: Any, digits: int = 6) -> str:
    """A number with so many digits, ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def place_rows(position: Any, data: Any) -> list[tuple[str, str]]:
    """Where training is and what it trains on, as labels and texts; in a loop, one row for each loader."""
    rows = [("position", _facts_text(position)), ("data", _facts_text(data))]
    places, kinds = _inner(_inner(position).get("loaders")), _inner(data)
    for name in dict.fromkeys([*places, *kinds]):
        texts = (_facts_text(_inner(places.get(name)).get("position")), _facts_text(kinds.get(name)))
        rows.append((name, "; ".join(text for text in texts if text)))
    return [(label, text) for label, text in rows if text]


def _inner(value: Any) -> dict[str, Mapping[Any, Any]]:
    """What of ``value`` is a mapping, by name."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {str(name): item for name, item in items if isinstance(item, Mapping)}


def _facts_text(facts: Any) -> str:
    """The numbers and texts of a mapping, each after its name."""
    items = facts.items() if isinstance(facts, Mapping) else ()
    return ", ".join(
        f"{name} {number_text(value)}"
        for name, value in items
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    )


def time_text(created: Any) -> str:
    """A time in ISO 8601 as it is called here, to the minute; what is no time as it is."""
    if not isinstance(created, str):
        return "-"
    try:
        return datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return created


def metric_text(metric: Report | None, *, named: bool = True) -> str:
    """A checkpoint's metric, with its name or without."""
    if metric is None:
        return "-"
    return f"{metric['name'] or 'best'} {number_text(metric['value'])}" if named else number_text(metric["value"])


def event_text(event: Report) -> str:
    """One event of the log in a line, without its time; of facts that are not known here only the reasons."""
    facts = dict(event["facts"])
    step, seconds, size = (facts.pop(name, None) for name in ("step", "seconds", "bytes"))
    words = [str(event["event"])]
    words += [] if step is None else [f"step {step}"]
    words += [size_text(size)] if _is_amount(size) else []
    words += [f"in {seconds:.3g} s"] if _is_amount(seconds) else []
    rate = facts.get("mb_per_second")
    words += [f"{rate:.3g} MB/s"] if _is_amount(rate) else []
    stalls = (value for name, value in facts.items() if name.startswith("stall") and _is_amount(value))
    words += [f"training waited {seconds_text(value)}" for value in stalls]
    words += [str(value) for name, value in facts.items() if name in ("why", "error", "reason")]
    return ", ".join(words)


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1 << 62


def weights_text(weights: Report) -> str:
    """How many tensors of which kinds."""
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(weights["dtypes"].items()))
    return f"{count_text(weights['tensors'], 'tensor')}, {weights['elements']:,} elements ({kinds})"


def stopping_text(decision: Any) -> str:
    """Where early stopping stands, from its saved state."""
    if not isinstance(decision, Mapping):
        return "off"
    best, counter = decision.get("best_metric"), decision.get("counter")
    if decision.get("should_stop"):
        return f"stopped: {decision.get('reason')}"
    return (
        f"best {number_text(best)}; no improvement in the last {counter} of {decision.get('evaluations')} evaluations"
    )


def seconds_text(seconds: float) -> str:
    """A duration with the unit that suits it: ``80 ms``, ``1.25 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def receipt_rows(receipt: Report) -> list[tuple[str, str]]:
    """A receipt of a resume as labels and texts; what is not as it should be is skipped."""
    rows = [("resumed", f"{time_text(receipt.get('time'))}, {receipt.get('checkpoint')}, step {receipt.get('step')}")]
    verified, proved = receipt.get("verified"), receipt.get("proved")
    if isinstance(verified, Mapping) and isinstance(verified.get("bytes"), int):
        rows.append(("verified", f"{verified.get('files')} files, every byte of {size_text(verified['bytes'])}"))
    else:
        rows.append(("verified", "no file was read before"))
    if isinstance(proved, Mapping):
        rows.append(("proved", ", ".join(f"{count} {kind}" for kind, count in proved.items() if count)))
    for label in ("restored", "repaired"):
        names = receipt.get(label)
        if isinstance(names, list) and names:
            shown = ", ".join(map(str, names[:8]))
            rows.append((label, shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")))
    differences = receipt.get("differences")
    if isinstance(differences, list):
        rows += [("differs", str(one.get("what"))) for one in differences if isinstance(one, Mapping)]
    why = receipt.get("why_not_exact")
    rows += [("not exact", str(reason)) for reason in why] if isinstance(why, list) and why else [("exact", "yes")]
    return rows
