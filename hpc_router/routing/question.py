"""Finds the part of a long message that states what the user wants: its question.

Programs and people put other text around a question: rules of a repository, a document, a log, quoted messages, or the
instructions of a chat program for titles and tags. This text is longer than the question, so it would decide alone if
every word counted the same. The classifier therefore reads the question by itself first, and the whole message only if
the question says too little (`Classifier.read`). This module knows texts only, no terms and no experts.
"""

import re
from typing import Final

MIN_CHARS: Final = 200
"""Minimum length, in characters, of a message in which a question is looked for; a shorter one is read as a whole."""

# Blocks in which clients put the user's words: a query beside retrieved documents, or the chat that gets a title.
_USER_BLOCK: Final = re.compile(
    r"<(user_query|user_question|user_request|query|question|chat_history|conversation)>(.*?)</\1>", re.DOTALL
)
# Blocks that clients add before or after the user's words (`<system-reminder>`, `<environment_context>`).
_FIRST_BLOCK: Final = re.compile(r"\s*<([A-Za-z][\w-]*)>.*?</\1>\s*", re.DOTALL)
_CLOSING_TAG: Final = re.compile(r"</([A-Za-z][\w-]*)>$")
_QUOTED_LINE: Final = re.compile(r"^[ \t]*>.*$\n?", re.MULTILINE)
_SENTENCE_END: Final = re.compile(r"[.!?]\s+|[。！？]\s*")
QUESTION_MARKS: Final = ("?", "？", "؟")


def has_parts(text: str) -> bool:
    """Returns False for a text of one line, without marked blocks, that does not end in a question mark. In such a text
    `split_message` finds no question."""
    # Looking for one character is many times faster than looking for two.
    return "\n" in text or "<" in text or text.rstrip().endswith(QUESTION_MARKS)


def split_message(text: str) -> tuple[str, str | None]:
    """Returns what a message says, and the question in it; the question is None if no part of the message stands out.

    Where a client marks the user's words with a block, the message says the content of that block, else the whole text.
    The question is looked for without other marked blocks and without quoted lines: it is the last paragraph, or the
    first one if only that ends in a question mark. In a message of one paragraph it is the last line or sentence, if
    that ends in a question mark: other lines may be options of one question, which say less than the whole.
    """
    own = text = text.strip()
    if len(text) < MIN_CHARS:
        return text, None
    if "<" in text and "</" in text:
        marked = [content for _, block in _USER_BLOCK.findall(text) if (content := block.strip())]
        if marked:
            own = text = marked[-1]
        own = _without_outer_blocks(own)
    if ">" in own and (own.startswith(">") or "\n>" in own):
        own = _QUOTED_LINE.sub("", own).strip() or own
    question = _paragraph(own) if len(own) >= MIN_CHARS else None
    return text, question or (own if len(own) < len(text) else None)


def _without_outer_blocks(text: str) -> str:
    """Returns the text without the marked blocks at its start and its end; the whole text if nothing else remains."""
    own = text
    while own.startswith("<") and (block := _FIRST_BLOCK.match(own)):
        own = own[block.end() :]
    while own.endswith(">") and (closing := _CLOSING_TAG.search(own)):
        start = own.rfind(f"<{closing[1]}>")
        if start < 0:
            break
        own = own[:start].rstrip()
    return own or text


def _paragraph(text: str) -> str | None:
    """Returns the paragraph, line or sentence that is the question; None if the text does not consist of several."""
    if "\n" not in text:
        return _last_sentence(text)
    end = text.rfind("\n\n")
    if end < 0:
        last = text[text.rfind("\n") :].strip()
        return last if last.endswith(QUESTION_MARKS) else None
    last = text[end:].lstrip()
    if not last.endswith(QUESTION_MARKS):
        first = text[: text.find("\n\n")].rstrip()
        if first.endswith(QUESTION_MARKS):
            return first
    return last


def _last_sentence(text: str) -> str | None:
    """Returns the last sentence, if it ends in a question mark and others precede it; else None."""
    text = text.rstrip()
    if not text.endswith(QUESTION_MARKS):
        return None
    start = 0
    for end in _SENTENCE_END.finditer(text, 0, len(text) - 1):
        start = end.end()
    return text[start:] if start else None
