"""The tokenizer in a GGUF header, built with the tokenizers library.

A header holds the vocabulary, each token's kind, merges or scores, and the name of the way text is split before
merging; what that name means is written down in the format's own reader only (llama.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.ipc.messages import TokenizerAssets
from engine.loading.gguf.header import GGUFHeader
from engine.models.model_error import ModelError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # what SentencePiece writes for a space
_SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"


@dataclass(frozen=True, slots=True)
class Splitting:
    """What a pre-tokenizer's name stands for. No pattern: GPT-2's."""

    pattern: str | None = None
    splits_digits: bool = False  # every digit by itself, before the pattern
    composes: bool = False  # Unicode NFC first
    ignores_merges: bool = False  # a piece that is in the vocabulary is one token, whatever the merges
    adds_bos: bool = False  # unless the header says otherwise


_LLAMA3 = Splitting(_WORD + r"|\p{N}{1,3}" + _TAIL, ignores_merges=True, adds_bos=True)
_QWEN2 = Splitting(_WORD + r"|\p{N}" + _TAIL, composes=True)
SPLITTINGS = {
    "default": Splitting(),
    "gpt-2": Splitting(),
    "smollm": Splitting(splits_digits=True),
    "starcoder": Splitting(splits_digits=True),
    "refact": Splitting(splits_digits=True),
    "command-r": Splitting(splits_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": Splitting(_LLAMA3.pattern),
    "chatglm-bpe": Splitting(_LLAMA3.pattern),
    "glm4": Splitting(_LLAMA3.pattern),
    "olmo": Splitting(),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": Splitting(_QWEN2.pattern),
    "tekken": Splitting(
        _CASED_WORD + r"|\p{N}" + _TAIL.replace(r"[\r\n]*", r"[\r\n/]*"), ignores_merges=True, adds_bos=True
    ),
}


def gguf_tokenizer(header: GGUFHeader) -> TokenizerAssets:
    """ModelError for a vocabulary of another kind, or one that contradicts itself."""
    kind = header.string("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            tokenizer, adds_bos = _byte_level(header)
        elif kind == "llama":
            tokenizer, adds_bos = _sentencepiece(header), True
        else:
            raise ModelError(
                f"{header.path}: a tokenizer of kind {kind!r} is not supported as GGUF; "
                "name the original's directory or hub id in model.tokenizer"
            )
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises no narrower class
        raise ModelError(f"{header.path}: its tokenizer cannot be built: {error}; set model.tokenizer") from error
    special = _special_tokens(header)
    if header.metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    template = header.metadata.get("tokenizer.chat_template")
    return TokenizerAssets(
        tokenizer_json=tokenizer.to_str(),
        chat_template=template if isinstance(template, str) else None,
        special_tokens=special,
    )


def _byte_level(header: GGUFHeader) -> tuple[Tokenizer, bool]:
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in SPLITTINGS:
        raise ModelError(
            f"{header.path}: the way its text is split, {name!r}, is not known here; "
            "name the original's directory or hub id in model.tokenizer"
        )
    splitting = SPLITTINGS[name]
    merges = [_pair(merge) for merge in header.strings("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=_vocab(header), merges=merges, ignore_merges=splitting.ignores_merges))
    if splitting.composes:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.splits_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, header)
    return tokenizer, splitting.adds_bos


def _sentencepiece(header: GGUFHeader) -> Tokenizer:
    """SentencePiece's BPE: pieces with scores, spaces as a character, bytes for what no piece covers."""
    vocab = _vocab(header)
    unknown = header.strings("tokenizer.ggml.tokens")[header.integer("tokenizer.ggml.unknown_token_id", 0)]
    is_gemma = header.architecture.startswith("gemma")
    merges = _merges_from_scores(header, vocab, by_id=is_gemma)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    adds_space = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if adds_space else spaces
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    _add_whole_tokens(tokenizer, header)
    return tokenizer


def _vocab(header: GGUFHeader) -> dict[str, int]:
    return {_spell(token): index for index, token in enumerate(header.strings("tokenizer.ggml.tokens"))}


def _spell(token: str) -> str:
    """Pieces of nothing but spaces stand in Gemma's files as they are, all others as SentencePiece writes them."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _kinds(header: GGUFHeader) -> list[float]:
    """Each token's kind; empty where the file does not say."""
    return header.numbers("tokenizer.ggml.token_type") if "tokenizer.ggml.token_type" in header.metadata else []


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _merges_from_scores(header: GGUFHeader, vocab: dict[str, int], *, by_id: bool) -> list[tuple[str, str]]:
    """The merges that give each piece, best score first; Gemma's scores say nothing, there the order of ids does."""
    if "tokenizer.ggml.merges" in header.metadata:
        return [_pair(merge) for merge in header.strings("tokenizer.ggml.merges")]
    scores = [-index for index in range(len(vocab))] if by_id else header.numbers("tokenizer.ggml.scores")
    kinds = _kinds(header)
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        if kinds and kinds[index] == _CONTROL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_whole_tokens(tokenizer: Tokenizer, header: GGUFHeader) -> None:
    """Control and user-defined tokens are matched in the text before anything is split."""
    tokens, kinds = header.strings("tokenizer.ggml.tokens"), _kinds(header)
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL and token]
    plain = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED and token.strip(" ")]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _special_tokens(header: GGUFHeader) -> dict[str, str]:
    tokens = header.strings("tokenizer.ggml.tokens")
    special: dict[str, str] = {}
    for key, name in _SPECIAL_TOKENS.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special[name] = tokens[token_id]
    return special
