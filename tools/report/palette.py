"""Colours of the page and its charts: one meaning, one colour, on light and on dark paper.

Pairs that touch differ in lightness too, so that they stay apart for readers who do not see all hues. Charts are
drawn in the light colours; `svg.py` makes each of them a CSS variable.
"""

from __future__ import annotations

LIGHT_AND_DARK = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "faint": ("#59636e", "#9aa4af"),
    "rule": ("#d8dee4", "#353c45"),
    "paper": ("#fefefe", "#15191e"),
    "panel": ("#f5f7f9", "#1d2329"),
    "good": ("#116329", "#56d364"),
    "bad": ("#b3261e", "#ff8a80"),
    "kept": ("#1f6fb2", "#3f8fd6"),
    "filled": ("#62b8e8", "#8fd3f7"),
    "rectified": ("#f2b134", "#f5c15c"),
    "dropped": ("#c0392b", "#d9534a"),
    "padding": ("#c9ced4", "#4b535d"),
    "forward": ("#4477aa", "#4f86bf"),
    "backward": ("#228833", "#2f9a44"),
    "input-gradient": ("#5aa469", "#55a568"),
    "weight-gradient": ("#b7d8a8", "#a3cb91"),
    "recomputation": ("#cc3311", "#e2573a"),
    "hidden-recomputation": ("#eeb233", "#e9b13c"),
    "communication": ("#3a3f45", "#cdd4db"),
    "hidden-communication": ("#aeb6bf", "#66717d"),
    "gradient-reduction": ("#aa3377", "#c85b98"),
    "optimizer": ("#66ccee", "#58b9db"),
    "idle": ("#eef0f2", "#242b32"),
    "warm-up": ("#c8ab78", "#8f774b"),
    "waits": ("#e6d7b8", "#c2a772"),
    "cool-down": ("#b08d4f", "#6b5832"),
    "run-0": ("#2f6db5", "#6fb1f5"),
    "run-1": ("#d9512c", "#ff8a5c"),
    "run-2": ("#1c8a5a", "#4fcf97"),
    "run-3": ("#a0408f", "#e08fd2"),
    "run-4": ("#9a7b0a", "#e0c24a"),
    "run-5": ("#2a9db0", "#66d5e6"),
    "run-6": ("#6b5b4d", "#c9b8a6"),
}

LIGHT = {name: light for name, (light, _) in LIGHT_AND_DARK.items()}

DASHES = ("solid", "dashed", "dotted")
"""Lines of runs beyond the seventh: the same colours once more, dashed."""


def run_line(index: int) -> tuple[str, str]:
    """Name of the colour and of the dashes of run number `index`."""
    colours = sum(name.startswith("run-") for name in LIGHT)
    return f"run-{index % colours}", DASHES[index // colours % len(DASHES)]


def variables() -> str:
    """The colours as CSS: light by default and in print, dark where the reader's system is."""
    light, dark = ("".join(f"--{name}:{pair[tone]};" for name, pair in LIGHT_AND_DARK.items()) for tone in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
