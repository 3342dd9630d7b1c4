"""Words about texts in which the beginning of the response cannot be found: what is at fault, and what mends that."""

from collections import Counter
from typing import NamedTuple

from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError

_TURNS = "turns that do not alternate, begin with the assistant or are a tool's"


class Faults(NamedTuple):
    """Faults that were met while texts were rendered, each with the number of texts."""

    refusal: str
    """What the template said of the first conversation that it refused; empty where it refused none."""
    not_shown: Counter[str]
    """What the template leaves out, by its kind."""
    special: Counter[str]
    """Special tokens of the tokenizer that stand in contents."""


def named_counts(counts: Counter[str], most: int = 5) -> str:
    """Name the most frequent with their numbers: `<|im_end|>: 3, </s>: 1`."""
    listed = ", ".join(f"{name}: {count}" for name, count in counts.most_common(most))
    return f"{listed}, ..." if len(counts) > most else listed


def why_unmarked(faults: Faults) -> str:
    """Say why the header of a chat template does not show where each response begins."""
    if faults.special:
        return (
            f"special tokens in the texts themselves, {named_counts(faults.special)}; or {_TURNS}"
        )
    return _TURNS


def refused(
    encoder: TextEncoder,
    num_kept: int,
    reasons: Counter[str],
    num_with_prompt: int,
    marker: list[int] | None,
    faults: Faults,
) -> UserError:
    """The error for data of which too few texts show where the response begins.

    Args:
        encoder: what rendered them.
        num_kept: texts that show it.
        reasons: the others by their reason in `stores.REASONS`.
        num_with_prompt: all texts with a prompt.
        marker: tokens that were looked for; None where no text has any.
        faults: see `Faults`.
    """
    key = "the chat template's assistant header" if encoder.uses_template else "data.separator"
    text = encoder.header if encoder.uses_template else encoder.separator
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    listed += f"; the template says: {faults.refusal}" if faults.refusal else ""
    for kind, count in faults.not_shown.items():
        listed += f"; the template leaves out: {kind} ({count} texts)"
    tokens = "" if marker is None else f" (tokens {encoder.tokenizer.decode(marker)!r})"
    other = (
        "set data.chat_template: never"
        if encoder.uses_template
        else "choose a separator that no text contains and that ends in a newline"
    )
    return UserError(
        f"{key} {text!r}{tokens} marks the start of the response in only {num_kept} of "
        f"{num_with_prompt} texts ({listed}); at least 99.9% must keep it, or no one can tell the "
        f"prompt from the response. {_remedy(encoder, reasons, faults)}, or {other}"
    )


def _remedy(encoder: TextEncoder, reasons: Counter[str], faults: Faults) -> str:
    """Say what mends the most frequent reason."""
    most = reasons.most_common(1)[0][0] if reasons else "boundary"
    if most == "template" and faults.refusal:
        return "Bring the conversations into the form that the template asks for"
    if most == "template":
        return (
            "The template writes a prompt otherwise once a response follows it, or writes nothing of the response: "
            "give a tokenizer with another template"
        )
    if most == "boundary" and faults.not_shown:
        return "Give a tokenizer whose template shows what the responses say"
    if most == "boundary":
        return "Strip blank space from the responses"
    if faults.special:
        return f"Take special tokens out of the texts ({named_counts(faults.special)})"
    if encoder.uses_template:
        return f"Leave out {_TURNS}"
    return "Take the separator out of the texts"
