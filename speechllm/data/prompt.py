"""From an utterance to the segments of an example, with the LLM's own chat template.

Plain speech recognition is `[prefix][audio][suffix][target][end token]`. Prefix and suffix are what
the chat template puts around the audio; only target and end token are trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

import jinja2

from speechllm.config import model as schema
from speechllm.data.prefix import common_prefix
from speechllm.errors import ConfigError, DataError, ModelError
from speechllm.types import AudioSegment, Example, Segment, TextSegment, Utterance

AUDIO = "{audio}"
STAND_IN = "[[AUDIO-STAND-IN]]"  # for what a chat template must neither trim nor escape
CACHED_TEXTS = 1024
TEXTS_AT_ONCE = 1024  # more would take 10 KB each

Tokens = tuple[int, ...]


class Prompter:
    """Turns utterances into examples. Picklable; the same in every process.

    Args:
        tokenizer: of the LLM.
        prompt: kind, system turn and texts.
        seed: which of several texts an utterance gets is a function of (seed, epoch, key).

    Attributes:
        end_token_id: what ends the model's turn in the chat template, otherwise the tokenizer's
            end of sequence. Trained, and where decoding stops.
        prompt_tokens: how many prefix, suffix and end token take together, for each of the
            configured texts.
        prefix: tokens with which every example of the configured texts begins.

    Raises:
        ConfigError: chat is asked of a tokenizer without a template, or its template refuses.
        ModelError: the tokenizer has no token that ends a sequence.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: schema.Prompt, seed: int
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._seed = seed
        self._pieces: dict[str, tuple[Tokens, Tokens]] = {}
        if prompt.kind == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                f"model.prompt.kind: the tokenizer of {tokenizer.name_or_path} has no chat "
                "template. Set model.prompt.kind=plain, or use an instruction-tuned LLM."
            )
        self.end_token_id = self._find_end_token()
        self.prompt_tokens = tuple(map(self._tokens_of, prompt.texts))
        self.prefix = common_prefix(self.pieces(text)[0] for text in prompt.texts)

    @property
    def max_prompt_tokens(self) -> int:
        return max(self.prompt_tokens)

    @property
    def advice(self) -> str | None:
        """What is wrong with texts that begin with the audio, and the remedy.

        The LLM's attention sink (Xiao et al., 2024, "Efficient streaming language models with
        attention sinks") is the first position. Where that is an audio token, the gradient of the
        connector runs through activations a hundred times larger than any other; what that costs
        is in docs/decisions.md.
        """
        texts = [text for text in self._prompt.texts if not self.pieces(text)[0]]
        if not texts:
            return None
        first = self._tokenizer.bos_token or self._tokenizer.eos_token
        return (
            f"model.prompt.texts: {texts[0]!r} begins with the audio, which then is the LLM's "
            f"attention sink and trains badly; begin with the LLM's first token: "
            f"{first + texts[0]!r}"
        )

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all that the tokens of targets and prompts follow from."""
        tokenizer = self._tokenizer
        rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
        facts = [rules, tokenizer.chat_template, self._prompt.model_dump_json()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def target_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as a target, its end token left out."""
        stripped = [text.strip() for text in texts]
        if not self._tokenizer.is_fast:
            return [len(self._encode(text, split_special_tokens=True)) for text in stripped]
        backend = self._prepared_backend(split_special_tokens=True)
        counts = []
        for at in range(0, len(stripped), TEXTS_AT_ONCE):
            batch = backend.encode_batch(
                stripped[at : at + TEXTS_AT_ONCE], add_special_tokens=False
            )
            counts += [len(encoding.ids) for encoding in batch]
        return counts

    def own_prompt_tokens(self, utterance: Utterance) -> int:
        """As `prompt_tokens`, of the utterance's own `prompt` field; 0 where it has none. Raises
        DataError where that cannot be used."""
        text = self._own_text(utterance)
        return 0 if text is None else self._tokens_of(text)

    def text_number(self, key: str, epoch: int) -> int:
        """Which of the configured texts the utterance of that key is trained with in that epoch."""
        if len(self._prompt.texts) == 1:
            return 0
        name = f"{self._seed}\n{epoch}\n{key}".encode(errors="surrogateescape")
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest, "little") % len(self._prompt.texts)

    def example(self, utterance: Utterance, epoch: int, *, with_target: bool) -> Example:
        """The segments of one utterance.

        Args:
            with_target: add target and end token (training, loss). Without, as for generation,
                the prompt is always the first configured text. In either case the utterance's own
                `prompt` field goes first.

        Raises:
            DataError: the utterance's `prompt` field cannot be used.
        """
        number = self.text_number(utterance.key, epoch) if with_target else 0
        text = self._own_text(utterance) or self._prompt.texts[number]
        prefix, suffix = self.pieces(text)
        segments: list[Segment] = [AudioSegment(utterance.samples, encoded=utterance.encoded)]
        if prefix:
            segments.insert(0, TextSegment(prefix))
        if suffix:
            segments.append(TextSegment(suffix))
        if with_target:
            # A transcript that happens to spell a special token stays ordinary text.
            target = self._encode(utterance.text.strip(), split_special_tokens=True)
            segments.append(TextSegment((*target, self.end_token_id), trained=True))
        return Example(utterance.key, tuple(segments))

    def pieces(self, text: str) -> tuple[Tokens, Tokens]:
        """Tokens before and after the audio for one prompt text, kept for the next utterance."""
        if text not in self._pieces:
            if len(self._pieces) >= CACHED_TEXTS:
                self._pieces.pop(next(iter(self._pieces)))
            before, after = self.render(text)
            self._pieces[text] = (self._bos() + self._encode(before), self._encode(after))
        return self._pieces[text]

    def render(self, text: str) -> tuple[str, str]:
        """What stands before and after the audio, as text.

        Raises:
            ConfigError: the chat template refuses the turns or changes the user's turn.
        """
        if AUDIO not in text:
            text += AUDIO
        if self._prompt.kind == "plain":
            before, after = text.split(AUDIO)
            return before, after
        turn = {"role": "user", "content": text.replace(AUDIO, STAND_IN)}
        parts = self._apply_template([turn], add_generation_prompt=True).split(STAND_IN)
        if len(parts) != 2:
            raise ConfigError(
                f"model.prompt: the chat template of {self._tokenizer.name_or_path} renders the "
                f"user's turn {len(parts) - 1} times, not once. Set model.prompt.kind=plain."
            )
        return parts[0], parts[1]

    def _own_text(self, utterance: Utterance) -> str | None:
        text = utterance.fields.get("prompt")
        if text is None:
            return None
        if not isinstance(text, str) or text.count(AUDIO) > 1:
            raise DataError(
                f"utterance {utterance.key}: its `prompt` must be a text with {AUDIO} at most "
                f"once, but is {text!r}"
            )
        return text.strip() or None

    def _tokens_of(self, text: str) -> int:
        return 1 + sum(map(len, self.pieces(text)))

    def _bos(self) -> Tokens:
        """For plain prompts, the token that the tokenizer starts a text with, where it does.

        A chat template writes its own, or wants none.
        """
        if self._prompt.kind == "chat":
            return ()
        first = self._tokenizer("a")["input_ids"][0]
        return (first,) if first == self._tokenizer.bos_token_id else ()

    def _find_end_token(self) -> int:
        if self._prompt.kind == "chat":
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": STAND_IN}]
            rendered = self._apply_template(turns, add_generation_prompt=False)
            added = self._tokenizer.added_tokens_decoder
            for token in self._encode(rendered.rpartition(STAND_IN)[2]):
                if token in added:
                    return token
        if self._tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {self._tokenizer.name_or_path} has no end-of-sequence token, "
                "so decoding could not stop. Set `eos_token` in its tokenizer_config.json."
            )
        return self._tokenizer.eos_token_id

    def _apply_template(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if self._prompt.system is not None:
            turns = [{"role": "system", "content": self._prompt.system}, *turns]
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"model.prompt: the chat template of {self._tokenizer.name_or_path} refuses the "
                f"turns {[turn['role'] for turn in turns]}: {error}. Leave out model.prompt.system "
                "or set model.prompt.kind=plain."
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _encode(self, text: str, *, split_special_tokens: bool = False) -> Tokens:
        if not text:
            return ()
        if self._tokenizer.is_fast:
            # What the tokenizer's own call does around this takes 0.1 ms, 3 % of decoding audio.
            backend = self._prepared_backend(split_special_tokens=split_special_tokens)
            return tuple(backend.encode(text, add_special_tokens=False).ids)
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens
        )
        return tuple(encoded["input_ids"])

    def _prepared_backend(self, *, split_special_tokens: bool) -> Tokenizer:
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = split_special_tokens
        backend.no_truncation()
        backend.no_padding()
        return backend
