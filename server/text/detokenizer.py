"""Incremental detokenisation: text from token ids as they come."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from server.text.stop_strings import StopSearch, StopStrings
from server.text.tokenizer import Tokenizer

NO_STOPS = StopStrings()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How a request wants its tokens turned into text, and which text ends it."""

    stop: StopStrings = NO_STOPS
    include_stop: bool = False
    min_tokens: int = 0  # stop strings that end before this many tokens are ordinary text
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    tells_special_tokens: bool = False  # those that are skipped, by their places: for parsers of what was written


class Detokenizer:
    """Decodes one choice's tokens and watches for its stop strings.

    Works a token at a time, so that the text does not depend on how the tokens were grouped into steps. Two kinds of
    text are held back: the first bytes of a character whose last bytes have not come, and what may be the beginning
    of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._unfinished = b""  # what may be the first bytes of a character
        self._stops = StopSearch(options.stop)
        self._held = ""
        self._after_special = False
        self.num_tokens = 0
        self.begins_at = 0  # of the newest token: its first character in the text, or the one it helps to complete
        self.num_characters = 0  # decoded so far, held ones included
        self.num_released = 0  # characters of the text that was given out
        self.matched_stop: str | None = None
        self._specials: list[tuple[int, str]] = []  # skipped: their places in characters, and how they are spelt

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token. After `matched_stop` is set, push nothing more."""
        assert self.matched_stop is None
        self.num_tokens += 1
        token = self._bytes(token_id)
        self.begins_at = self._begin(token)
        return self._release(self._decode(token))

    def flush(self) -> str:
        """The text that was held back, once no more tokens will come. An unfinished character becomes U+FFFD."""
        if self.matched_stop is not None:
            return ""
        unfinished, self._unfinished = self._unfinished, b""
        text = self._release(unfinished.decode(errors="replace"))
        text, held, self._held = text + self._held, self._held, ""
        self.num_released += len(held)
        return text

    def take_specials(self) -> list[tuple[int, str]]:
        """The special tokens that were skipped in the text given out, or right behind it, since the last time."""
        taken = [special for special in self._specials if special[0] <= self.num_released]
        self._specials = self._specials[len(taken) :]
        return taken

    @property
    def is_holding(self) -> bool:
        """Characters wait for what will tell whether they begin a stop string."""
        return bool(self._held)

    @property
    def end(self) -> int:
        """Where the text ends if no more comes."""
        return self.num_characters + len(self._unfinished.decode(errors="replace"))

    def _begin(self, token: bytes) -> int:
        """Where a token begins: at the character that its first byte is, or helps to complete."""
        unfinished = self._unfinished
        if not unfinished or not token:
            return self.num_characters
        return self.num_characters + len((unfinished + token[:1]).decode(errors="replace")) - 1

    def _bytes(self, token_id: int) -> bytes:
        is_special = token_id in self._tokenizer.special_ids
        if is_special and self._options.skip_special_tokens:
            if self._options.tells_special_tokens:
                self._specials.append((self.num_characters, self._tokenizer.token_text(token_id)))
            return b""
        token = self._tokenizer.token_bytes(token_id)
        if is_special and self._after_special and not self._options.spaces_between_special_tokens:
            token = token.removeprefix(b" ")
        self._after_special = is_special
        return token

    def _decode(self, token: bytes) -> str:
        """Keeps the first bytes of a character whose last bytes have not come."""
        data = self._unfinished + token
        text, num_read = codecs.utf_8_decode(data, "replace", False)
        self._unfinished = data[num_read:]
        return text

    def _release(self, piece: str) -> str:
        text = self._certain(piece)
        self.num_released += len(text)
        return text

    def _certain(self, piece: str) -> str:
        self.num_characters += len(piece)
        if not self._options.stop:
            return piece
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            found = self._stops.advance(character)
            if found is not None and self.num_tokens >= self._options.min_tokens:
                self.matched_stop, self._held = found, ""
                return text[:end] if self._options.include_stop else text[: end - len(found)]
        certain = len(text) - self._stops.num_held
        self._held = text[certain:]
        return text[:certain]
