"""From a record to its tokens, sent as its own evaluation sends them: plain, or in the model's chat template.

The token for the beginning of a sequence comes once, also where the record's text begins with it.
"""

from __future__ import annotations

from typing import Any

from evaluation.readers import BadData, Record


def encode(tokenizer: Any, record: Record, chat: bool) -> list[int]:
    """The prompt's tokens, the start of the answer among them.

    Raises:
        BadData: a text that would be put into a chat template twice.
    """
    if record.sent == "kvpress":
        chat = getattr(tokenizer, "chat_template", None) is not None
    if chat and in_template(tokenizer, record.context or record.prompt):
        instead = ", which kvpress' columns get here" if record.sent == "kvpress" else "; leave --chat out"
        raise BadData(f"{record.task}: these prompts are in a chat template already{instead}")
    return SENT[record.sent](tokenizer, record, chat)


def one_text(tokenizer: Any, record: Record, chat: bool) -> list[int]:
    """The prompt, or a user's turn with it, and what follows it as one text."""
    prompt = in_turn(tokenizer, record.prompt) if chat else record.prompt
    return encode_once(tokenizer, prompt + record.answer_prefix, special=not chat)


def lm_eval(tokenizer: Any, record: Record, chat: bool) -> list[int]:
    """lm-eval's generate_until: a space between prompt and prefix where neither has one, or the turns of both."""
    prompt, prefix = record.prompt, record.answer_prefix
    if chat:
        turns = [{"role": "user", "content": prompt}]
        turns += [{"role": "assistant", "content": prefix}] if prefix else []
        how = {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
        text = tokenizer.apply_chat_template(turns, tokenize=False, **how)
    else:
        space = " " if prompt and prefix and not (prompt[-1].isspace() or prefix[0].isspace()) else ""
        text = prompt + space + prefix
    return encode_once(tokenizer, text)


def kvpress(tokenizer: Any, record: Record, chat: bool) -> list[int]:
    """kvpress' pipeline: the context by itself, then question and prefix, with a line's or a turn's end between.

    It takes the chat template of each tokenizer that has one, and has no model think.
    """
    if chat:
        end = "What follows the context."
        context, _, between = in_turn(tokenizer, record.context + end, enable_thinking=False).rpartition(end)
    else:
        bos, between = getattr(tokenizer, "bos_token", None) or "", "\n"
        context = record.context if bos and record.context.startswith(bos) else bos + record.context
    asked = record.prompt + between + record.answer_prefix
    return [token for text in (context, asked) for token in tokenizer.encode(text, add_special_tokens=False)]


SENT = {"text": one_text, "lm-eval": lm_eval, "kvpress": kvpress}


def encode_once(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The tokens of a text, with those that the tokenizer adds where `special`, but not a second first one."""
    tokens = tokenizer.encode(text, add_special_tokens=special)
    bos = tokenizer.bos_token_id
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens


def in_turn(tokenizer: Any, text: str, **options: Any) -> str:
    """A user's turn in the model's chat template, which may have options, up to the answer."""
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False, **options)


def turn_around(tokenizer: Any) -> tuple[str, str]:
    """The model's chat template before what a user says, and from there to the answer."""
    said = "What a user says."
    before, after = in_turn(tokenizer, said).split(said)
    return before, after


def in_template(tokenizer: Any, text: str) -> bool:
    """Whether a text begins as a chat does: with a special token, or as the model's own template."""
    head = turn_around(tokenizer)[0].removeprefix(getattr(tokenizer, "bos_token", None) or "").strip()
    begins = [head, *getattr(tokenizer, "all_special_tokens", [])]
    return text.lstrip().startswith(tuple(begin for begin in begins if begin))
