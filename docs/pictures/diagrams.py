"""The diagrams of "How it works", and the badges: boxes, arrows and words as SVG.

Everything is drawn in ``currentColor``, with one blue for what this package adds, so that a diagram suits a light and a
dark page.
"""

from __future__ import annotations

from html import escape

import hf_lifecycle

__all__ = ["BADGES", "DIAGRAMS"]

BLUE = "#3b8fd4"
FONT = "system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif"
_LINE = 16  # pixels from one line of words to the next


def words(x: float, y: float, text: str, *, anchor: str = "middle", faint: bool = False, size: int = 13) -> str:
    """Lines of words, the first one at ``y``."""
    style = f'text-anchor="{anchor}" font-size="{size}"' + (' opacity="0.7"' if faint else "")
    spans = (
        f'<text x="{x}" y="{y + _LINE * index}" {style} fill="currentColor">{escape(line)}</text>'
        for index, line in enumerate(text.split("\n"))
    )
    return "".join(spans)


def box(x: float, y: float, width: float, height: float, text: str, *, ours: bool = False) -> str:
    """A box with words in its middle; ``ours``: what this package adds."""
    stroke, fill = (BLUE, BLUE) if ours else ("currentColor", "currentColor")
    lines = text.count("\n")
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" fill-opacity="0.1" '
        f'stroke="{stroke}" stroke-width="1.4"/>'
        + words(x + width / 2, y + height / 2 + 4.5 - _LINE * lines / 2, text, size=12)
    )


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through ``points`` with a head at the last one."""
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.4"{dash} marker-end="url(#head)" '
        'opacity="0.85"/>'
    )


def diagram(width: int, height: int, label: str, *parts: str) -> str:
    """The whole picture; ``label`` says in words what it shows."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8Z" fill="currentColor"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}" font-family="{FONT}">{head}{"".join(parts)}</svg>'
    )


def save() -> str:
    """A background save along the training loop."""
    steps = [
        box(20 + 120 * index, 34, 108, 38, f"step {number}") for index, number in enumerate((40, 41, 42, 43, 44, 45))
    ]
    return diagram(
        760,
        286,
        "A background save: the small state is captured at step 40, tensors are copied during the forward and backward "
        "pass of step 41, and a thread writes, flushes and commits the checkpoint while training continues.",
        words(20, 22, "training loop", anchor="start", faint=True),
        *steps,
        words(20, 108, "save", anchor="start", faint=True),
        box(116, 118, 116, 54, "capture\nsmall state", ours=True),
        box(244, 118, 116, 54, "copy tensors\nto host memory", ours=True),
        box(372, 118, 116, 54, "write and flush\nin a hidden folder", ours=True),
        box(500, 118, 112, 54, "write\nmanifest.json", ours=True),
        box(624, 118, 116, 54, "rename to\ncheckpoint-40", ours=True),
        arrow((128, 72), (150, 116)),
        *(arrow((x, 145), (x + 11, 145)) for x in (232, 360, 488, 612)),
        arrow((302, 118), (258, 74), dashed=True),
        words(174, 200, "in the loop:\na few ms", faint=True, size=12),
        words(302, 200, "a thread; the next\noptimizer step waits\nfor the copy", faint=True, size=12),
        words(430, 200, "the same thread,\nbeside training", faint=True, size=12),
        words(556, 200, "size and digest\nof every file", faint=True, size=12),
        words(682, 200, "atomic: complete,\nor not there", faint=True, size=12),
        words(
            20,
            272,
            "Killed before the rename: checkpoint-20 is still the newest. Killed after it: checkpoint-40 is.",
            anchor="start",
            size=13,
        ),
    )


def resume() -> str:
    """What a resume does, in order."""
    left, width = 20, 226
    return diagram(
        760,
        300,
        "A resume: verify every byte, check that nothing differs that breaks exactness, let Trainer load, prove what "
        "was loaded against digests, repair what was lost, and restore RNG states last.",
        box(left, 40, width, 56, "1  verify\nevery byte against the manifest", ours=True),
        box(left + 247, 40, width, 56, "2  check\nversions, arguments, data, ranks", ours=True),
        box(left + 494, 40, width, 56, "3  load\nTrainer or Accelerate, as always"),
        box(left + 494, 150, width, 56, "4  prove\neach tensor against its digest", ours=True),
        box(left + 247, 150, width, 56, "5  repair\nwhat loading has lost", ours=True),
        box(left, 150, width, 56, "6  restore\nRNG states, at the first step", ours=True),
        arrow((left + width, 68), (left + 245, 68)),
        arrow((left + 247 + width, 68), (left + 492, 68)),
        arrow((left + 607, 96), (left + 607, 148)),
        arrow((left + 494, 178), (left + 475, 178)),
        arrow((left + 247, 178), (left + 228, 178)),
        words(left + width / 2, 24, "damaged: the one before is used", faint=True, size=12),
        words(left + 247 + width / 2, 24, "breaks exactness: an error", faint=True, size=12),
        words(left + 494 + width / 2, 228, "differs: repaired, and proved again", faint=True, size=12),
        words(left + 247 + width / 2, 228, "still differs: an error names it", faint=True, size=12),
        words(left + width / 2, 228, "then training continues", faint=True, size=12),
        words(
            20,
            280,
            "Every resume writes a receipt: what was verified, restored, proved and repaired, and whether it is exact.",
            anchor="start",
            size=13,
        ),
    )


def streams() -> str:
    """Which random numbers come from where."""
    rows = (
        ("seed, epoch", "order of the samples", "the same order in every process"),
        ("seed, epoch, batch number, rank", "content of a batch", "augmentation, masking, collation; in any worker"),
        ("generators of Python, NumPy, torch, devices", "training step", "dropout, noise; saved, and restored last"),
        ("generators of their own", "evaluation", "leaves those of training as they are"),
    )
    parts = [
        words(20, 24, "seeded from", anchor="start", faint=True),
        words(400, 24, "decides", anchor="start", faint=True),
        words(560, 24, "so that", anchor="start", faint=True),
    ]
    for index, (key, what, why) in enumerate(rows):
        y = 36 + 58 * index
        parts.append(box(20, y, 300, 42, key, ours=index < 2))
        parts.append(arrow((320, y + 21), (378, y + 21)))
        parts.append(box(380, y, 150, 42, what))
        first, _, rest = why.partition("; ")
        parts.append(words(546, y + (26 if not rest else 18), f"{first}\n{rest}".strip(), anchor="start", size=12))
    return diagram(
        860,
        276,
        "Four streams of random numbers: the order of samples, the content of a batch, the training step, evaluation.",
        *parts,
    )


def badge(name: str, value: str) -> str:
    """A small label."""
    left, right = 7 * len(name) + 14, 7 * len(value) + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{escape(name)}: {escape(value)}" font-family="{FONT}" font-size="11">'
        f'<rect width="{left + right}" height="20" rx="3" fill="#555"/>'
        f'<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1 -3 3h-{right - 3}z" fill="#1f6fb2"/>'
        f'<text x="{left / 2}" y="14" text-anchor="middle" fill="#fff">{escape(name)}</text>'
        f'<text x="{left + right / 2}" y="14" text-anchor="middle" fill="#fff">{escape(value)}</text></svg>'
    )


DIAGRAMS = {"save": save(), "resume": resume(), "rng-streams": streams()}
BADGES = {
    "badge-version": badge("version", hf_lifecycle.__version__),
    "badge-python": badge("python", "3.10 or newer"),
    "badge-license": badge("license", "Apache-2.0"),
}
