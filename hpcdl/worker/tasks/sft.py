"""Supervised fine-tuning: conversations, with the loss on the assistant's answers only."""

from __future__ import annotations

from hpcdl.errors import HpcdlError
from hpcdl.worker.data.records import Example, Record
from hpcdl.worker.tokenizer import Tokenizer

CUTS_DOCUMENTS = False


def example(record: Record, tokenizer: Tokenizer) -> Example | None:
    """The conversation in the tokenizer's chat template; what the assistant says (and its end) is a target.

    The text is cut at the borders of answers and each piece tokenised alone, just as it is when the model
    answers: a token never straddles a question and an answer.

    Raises:
        HpcdlError: the document is no conversation, or the template rewrites earlier turns.
    """
    if not record.messages:
        raise HpcdlError(
            "task=sft needs conversations or prompt/answer pairs; this data is plain text:"
            " use task=pretrain, or check data.messages_field, data.prompt_field and data.answer_field"
        )
    tokens: list[int] = list(tokenizer.prefix)
    targets = [False] * len(tokens)
    done = ""
    for index, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.chat(record.messages[:index], answer_next=True)
        answered = tokenizer.chat(record.messages[: index + 1], answer_next=False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise HpcdlError("the chat template changes earlier turns: answers can't be told from questions")
        for piece, is_answer in ((asked[len(done) :], False), (answered[len(asked) :], True)):
            ids = tokenizer.encode(piece)
            tokens += ids
            targets += [is_answer] * len(ids)
        done = answered
    return Example(tokens=tokens, targets=targets) if any(targets) else None


def prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """A question in the chat template, up to where the answer starts."""
    asked = tokenizer.chat([{"role": "user", "content": text}], answer_next=True)
    return [*tokenizer.prefix, *tokenizer.encode(asked)]
