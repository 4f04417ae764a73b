"""What is told of an export: export.json for programs, card.md for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcdl.runs.words import size


def markdown(found: Mapping[str, Any]) -> str:
    """The card as a page.

    Args:
        found: what export.json holds.
    """
    gate, speed = found["gate"], found.get("speed")
    lines = [f"# {found['name']}, {found['format']} {found['quant']}", ""]
    if gate["faults"]:
        lines += [
            "**The quality gate refused this file; it was accepted all the same (`--accept-loss`):**",
            "",
        ]
        lines += [f"- {fault}" for fault in gate["faults"]] + [""]
    lines += ["| | source | this file |", "|---|---|---|"]
    lines += [
        f"| size | {size(found['source_bytes'])} in 16 bits | {size(found['bytes'])}"
        f" ({found['bytes'] / found['source_bytes']:.0%}) |"
    ]
    if "perplexity_after" in gate:
        lines += [
            f"| held-out perplexity | {gate['perplexity_before']:.3f} | {gate['perplexity_after']:.3f}"
            f" ({gate['perplexity_ratio'] - 1:+.2%}; allowed {gate['perplexity_bound'] - 1:+.1%}) |"
        ]
    lines += ["", "| | |", "|---|---|"]
    if "logits_difference" in gate:
        lines += [
            f"| log-probabilities | differ by {gate['logits_difference']:.4f} of their spread (allowed"
            f" {gate['logits_bound']:g}), KL {gate['kl']:.4f} nats, the same likeliest token at"
            f" {gate['same_token']:.1%} of the positions |",
        ]
    if gate.get("worst_weights"):
        lines += [
            f"| weights | the furthest from its source is `{gate['worst_weights']}`, by"
            f" {gate['worst_weights_difference']:.3g} of its size (allowed {gate['weights_bound']:g}) |"
        ]
    if "lines" in gate:
        lines += [
            f"| tokenizer | {gate['lines'] - gate['lines_cut_otherwise']} of {gate['lines']} lines become the source's"
            " tokens |"
        ]
    lines += [f"| proved in | {gate.get('runtime') or 'no runtime: it could not run'} |"]
    if "targets" in gate:
        lines += [f"| held-out text | {found['data']}, {gate['targets']:,} target tokens |"]
    if speed:
        lines += [
            f"| peak memory | {size(speed['peak_rss_bytes'])} resident, of it {size(speed['import_rss_bytes'])} Python"
            f" and the runtime before the file is opened; {speed['context']} tokens of context |",
            f"| speed | {speed['prompt_tokens_per_s']:,.0f} tokens/s of prompt, {speed['tokens_per_s']:,.1f} tokens/s"
            f" written, {speed['threads']} thread{'s' * (speed['threads'] != 1)} |",
        ]
    if found.get("neurons"):
        keep, were = found["neurons"]
        lines += [f"| neurons | {keep} of {were} in each block: the others were pruned, and are left out |"]
    lines += [
        f"| numbers | {found['quant']}{_more(found.get('details') or {})} |",
        f"| made from | `{found['source']}`{_adapters(found)} |",
        f"| licence | {found['licence'] or 'not known: ask where the weights come from'} |",
        f"| made by | hpcdl {found['hpcdl']}, {found['made']} |",
        "",
    ]
    return "\n".join(lines)


def _more(details: Mapping[str, Any]) -> str:
    parts = [f"embedding and head {details['embedding']}"] if details.get("embedding") else []
    wider = details.get("wider_tensors") or ()
    if wider:
        parts.append(f"{len(wider)} tensors in 16 bits, as their rows are no whole blocks")
    return f" ({', '.join(parts)})" if parts else ""


def _adapters(found: Mapping[str, Any]) -> str:
    given = found.get("adapters") or {}
    return "".join(f" + `{path}`{'' if weight == 1 else f' × {weight:g}'}" for path, weight in given.items())
