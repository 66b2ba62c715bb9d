"""The model card of a sparse folder: README.md with the front matter of the Hugging Face hub.

Every figure comes from the reports given; what was not measured is not mentioned.
"""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import ModelCardData

from actvar_convert.cost.flops import FlopsReport
from actvar_convert.errors import counted
from actvar_convert.plan import SparsityPlan
from actvar_convert.show.figures import Table, listed, share
from actvar_convert.show.tables import Reports, card_table

TAGS = ("image-generation", "visual-autoregressive", "sparse", "mixture-of-experts", "token-gating", "actvar-convert")


def model_card(
    name: str,
    reports: Reports,
    *,
    plan: SparsityPlan | None = None,
    base_model: str | None = None,
    repository: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> str:
    """README.md of a sparse folder.

    Args:
        name: of the model.
        reports: whose figures the card shows.
        plan: the default plan, described in words.
        base_model: what the dense model is called, in the text.
        repository: where it lies on the hub (``owner/model``), for the front matter.
        provenance: what the model was made from and with, such as the sha256 of source and recipe; listed as given.
    """
    matter = ModelCardData(library_name="actvar-convert", license="mit", tags=list(TAGS), base_model=repository)
    parts = [f"---\n{matter.to_yaml()}\n---", f"# {name}", _opening(reports.flops, base_model)]
    parts += ["## Measured", markdown(card_table(reports))]
    if plan is not None:
        parts += ["## What is sparse", "\n".join(f"- {line}" for line in plan_in_words(plan))]
    parts += ["## Use", USE_OF_TEXT if _reads_text(reports.flops) else USE]
    if provenance:
        parts += ["## Provenance", "\n".join(f"- {key}: `{value}`" for key, value in provenance.items())]
    return "\n\n".join(parts) + "\n"


def markdown(table: Table) -> str:
    """A table and a list of its notes."""
    lines = [[column.name.replace("\n", " ") for column in table.columns]]
    lines.append(["---" if column.words else "---:" for column in table.columns])
    lines += [[cell.text.replace("|", "/") for cell in row.cells] for row in table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([text, *(["\n".join(f"- {note}" for note in table.notes)] if table.notes else [])])


def plan_in_words(plan: SparsityPlan) -> list[str]:
    """What a plan does, one sentence per idea."""
    scales = range(len(plan.blocks[0].prefix))
    cells = [(block, scale) for block in range(len(plan.blocks)) for scale in scales]
    running = [plan.active(*cell) for cell in cells]
    sparse = [cell for cell, active in zip(cells, running, strict=True) if active < plan.experts]
    lines = []
    if sparse:
        first = min(scale for _, scale in sparse)
        routed = sum(plan.routes(*cell) for cell in sparse)
        fewest = min(plan.active(*cell) for cell in sparse)
        blocks = counted(len({block for block, _ in sparse}), "block")
        lines.append(
            f"Experts: each FFN is split into {plan.experts}; from scale {first} on, {blocks} run part of them, "
            f"{fewest:g} at the least; a router picks per token in {routed} of {len(sparse)} such places."
        )
    gated = [(b, s) for b, s in cells if plan.blocks[b].keep[s] < 1]
    if gated:
        keep = min(plan.blocks[b].keep[s] for b, s in gated)
        blocks = counted(len({block for block, _ in gated}), "block")
        lines.append(
            f"Token gate: {blocks} compute part of the tokens at scales {listed(sorted({s for _, s in gated}))}, "
            f"{share(keep)} at the least; the others are filled in from the scale before and a map of rank "
            f"{plan.reconstruction_rank}, without keys and values."
        )
    if plan.guidance == "folded":
        lines.append(
            "Guidance: folded into the predictions at the strength that the model samples with; an image takes one row "
            "of the transformer instead of the dense model's two."
        )
    return lines or ["Nothing: the plan runs every expert for every token."]


def _opening(flops: FlopsReport, base_model: str | None) -> str:
    kind = "an Infinity" if _reads_text(flops) else "a dense VAR"
    source = f"`{base_model}`" if base_model else kind
    what = "text-to-image generator (Infinity)" if _reads_text(flops) else "VAR (visual autoregressive) image generator"
    text = f"A sparse {what}, made from {source} by actvar-convert."
    if flops.reduction is None:
        return text
    saved = f"{share(flops.reduction.transformer)} of the transformer's FLOPs"
    if flops.reduction.end_to_end is not None:
        saved += f", {share(flops.reduction.end_to_end)} with the image decoder"
    guidance = "with guidance" if flops.convention.guidance else "without guidance"
    return f"{text} Per image, {guidance}, it saves {saved}."


def _reads_text(flops: FlopsReport) -> bool:
    """Whether the model makes images of text, which it pays for."""
    return "text" in flops.dense.components


USE = """```python
import actvar_convert as av

model = av.load("path/to/this/folder")
images = model.generate([0, 1, 2], seed=0)  # [3, 3, H, W] in [0, 1]
```

```sh
actvar sample path/to/this/folder
actvar report-flops path/to/this/folder
```"""

USE_OF_TEXT = """```python
import actvar_convert as av

model = av.load("path/to/this/folder")
rows = av.TextRows.load("rows.safetensors")  # what the text encoder makes of B prompts
images = model.generate(rows, seed=0)  # [B, 3, H, W] in [0, 1]
```

```sh
actvar sample path/to/this/folder --rows rows.safetensors
actvar report-flops path/to/this/folder
```"""
