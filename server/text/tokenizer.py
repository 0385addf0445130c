"""Text to token ids and back, from the model's files: the `tokenizers` library and the model's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer as Backend

from engine.ipc.messages import TokenizerAssets
from server.text.chat_renderer import ChatRenderer
from server.text.template_worker import Plain, Render

Message = Mapping[str, object]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LONG_TEXT = 1024  # characters of all texts of a request; reading more than this leaves the event loop for a thread
_LONGEST_WORD = 1 << 16  # characters; more without a blank are no language
_CHARACTERS_PER_TOKEN = 8  # twice what texts have; where it is more, more is read
_TOKENS_NEAR_CUT = 64  # that may differ from those of the whole text
RESERVED_VARIABLES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "conversations",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
    }
)


class Tokenizer:
    """One model's tokenizer. Immutable after construction, so threads may share it."""

    def __init__(self, assets: TokenizerAssets) -> None:
        self._backend = Backend.from_str(assets.tokenizer_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._assets = assets
        self._bos_id = self._find_bos_id() if assets.add_bos_token else None
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._decoder_types = _decoder_types(self._backend)
        self._bytes: dict[int, bytes] = {}
        self._anchor = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = self._backend.decode(self._anchor, skip_special_tokens=False)
        self.max_token_characters = max(map(len, self._backend.get_vocab()), default=1)

    def _find_bos_id(self) -> int:
        token = self._assets.special_tokens.get("bos_token")
        token_id = self._backend.token_to_id(token) if token else None
        if token_id is None:
            raise ValueError(f"the model's files ask for a BOS token that its tokenizer does not have: {token!r}")
        return token_id

    @property
    def special_texts(self) -> frozenset[str]:
        """The texts of the special tokens, which an ordinary text never becomes."""
        return frozenset(token for id in self.special_ids if (token := self._backend.id_to_token(id)) is not None)

    @property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that were added to the vocabulary, special or not, by their texts: each is one token wherever its
        text stands."""
        return {token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def chat_template(self) -> str | None:
        return self._assets.chat_template

    @property
    def has_chat_template(self) -> bool:
        return self._assets.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `encode` would hold the interpreter's lock: a second for a megabyte
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return self._missing_bos(ids, add_special_tokens) + ids

    def _missing_bos(self, token_ids: list[int], add_special_tokens: bool) -> list[int]:
        """What must come first: the model's BOS token, where the tokenizer itself did not put it there."""
        if not add_special_tokens or self._bos_id is None or token_ids[:1] == [self._bos_id]:
            return []
        return [self._bos_id]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, by itself and without special tokens."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def token_spans(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, int] | None]:
        """From where to where in the text each of its tokens was read, in characters; None for those added to it.

        What a tokenizer makes of the text before it reads it shows: marks that it composed with their letter may lie in
        no token, and so may blanks, and a blank that it put first has the place of the character behind it.
        """
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        spans: list[tuple[int, int] | None] = [
            None if is_added else span
            for span, is_added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        ]
        return [*(None for _ in self._missing_bos(encoding.ids, add_special_tokens)), *spans]

    def encode_part(
        self, text: str, num_tokens: int, *, add_special_tokens: bool, from_end: bool = False
    ) -> tuple[list[int], bool]:
        """The tokens of a text, and True; or of one that has more, as many as wanted of one end of it, and False.

        Reads as much of the text as that takes. Where a text is cut, tokens near the cut may differ from those of the
        whole, so some more are made and left out. Cuts before the end are made between words, as tokens do not reach
        over them; only in a word of more than 65,536 characters, they are made anywhere.
        """
        num_made = num_tokens + _TOKENS_NEAR_CUT
        size = _CHARACTERS_PER_TOKEN * num_made
        while size < len(text):
            part = text[_word_end(text, len(text) - size) :] if from_end else text[:size]
            ids = self.encode(part, add_special_tokens=add_special_tokens)
            if len(ids) >= num_made:
                return (ids[-num_tokens:] if from_end else ids[:num_tokens]), False
            size *= 2
        return self.encode(text, add_special_tokens=add_special_tokens), True

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids without a token give no text."""
        (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to text that it does not begin; joined and read as UTF-8, they are the text."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def _read_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return b""
        if "ByteLevel" in self._decoder_types:
            return _byte_level_bytes(token)
        if "ByteFallback" in self._decoder_types and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        text = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text[len(self._anchor_text) :].encode()

    def token_text(self, token_id: int) -> str:
        """The token by itself, for people to read; what is not whole characters as its bytes: `bytes:\\xf0\\x9f`."""
        token = self.token_bytes(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    async def render_chat(
        self,
        renderer: ChatRenderer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Plain],
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """The prompt that the model's chat template makes of a conversation, in a sandbox and within limits.

        Raises ValueError if there is no template, or if the template or a limit refuses the conversation.
        """
        template = self._assets.chat_template
        if template is None:
            raise ValueError("this model has no chat template; use /v1/completions, or start with model.chat_template")
        if taken := sorted((RESERVED_VARIABLES | set(self._assets.special_tokens)) & set(variables)):
            raise ValueError(f"chat_template_kwargs must not set {', '.join(taken)}: the server sets it")
        developer = "developer" if "developer" in template else "system"
        limits = renderer.limits
        return await renderer.render(
            Render(
                template=template,
                turns=[dict(turn, role=developer) if turn["role"] == "developer" else dict(turn) for turn in messages],
                variables={**self._assets.special_tokens, **variables},
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                max_seconds=limits.max_seconds,
                max_characters=limits.max_characters,
                max_bytes=limits.max_bytes,
            )
        )


def _word_end(text: str, place: int) -> int:
    """The last place up to this one at which a word ends, if there is one not far from it."""
    for end in range(place, max(place - _LONGEST_WORD, 0), -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return end
    return place


def _decoder_types(backend: Backend) -> frozenset[str]:
    """The names of the steps that the tokenizer's decoder consists of."""
    if backend.decoder is None:
        return frozenset()
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(str(step["type"]) for step in [state, *state.get("decoders", [])])


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else the next code point from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_LEVEL[character] for character in token])
    except KeyError:  # an added token that was never spelt in the alphabet
        return token.encode()
