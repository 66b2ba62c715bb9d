"""Settings that recipes had once."""

REMOVED: dict[str, tuple[object, str]] = {
    "experts.neighbourhood": (1, "every token has experts of its own"),
    "experts.router_width": (0, "a router is one linear layer"),
    "experts.selection": ("fixed", "a router picks the plan's number of experts for every token"),
}
"""Dotted path of a setting: the value that became the rule, and what replaced it."""
