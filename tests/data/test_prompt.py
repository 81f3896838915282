import copy
from collections import Counter

import numpy as np

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from worker_copy import worker_copy

from speechllm.config.model import Prompt
from speechllm.data.prompt import CACHED_TEXTS, Prompter
from speechllm.errors import ConfigError, DataError, ModelError
from speechllm.model.tiny import build_tiny_llm
from speechllm.types import AudioSegment, Example, TextSegment, Utterance

# The ways in which released chat models write their turns; <|pad|> and <|endoftext|> are special
# tokens of the tiny tokenizer, which stand in for the families' own.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|pad|>\n\n' }}"
    "{{ m['content'] | trim + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|pad|>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
TEMPLATES = {"chatml": CHATML, "olmo2": OLMO2, "llama3": LLAMA3}


@pytest.fixture(scope="module", params=[False, True], ids=["pad", "pad_is_eos"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("llm") / "tiny"
    return AutoTokenizer.from_pretrained(build_tiny_llm(directory, pad_is_eos=request.param))


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase):
    """A tokenizer with another chat template."""

    def with_template(template: str | None) -> PreTrainedTokenizerBase:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return with_template


def utterance(text: str = "turn left", **fields: object) -> Utterance:
    return Utterance("key", np.zeros(1600, dtype=np.int16), text, fields)


def texts(example: Example) -> list[tuple[int, ...] | None]:
    """Tokens of the text segments, None for the audio."""
    return [s.tokens if isinstance(s, TextSegment) else None for s in example.segments]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ["Transcribe: {audio}", "{audio}\nWhat is said?", "Write down: "])
@pytest.mark.parametrize("system", [None, "You listen."])
def test_chat_prompt_is_what_the_template_renders(chat, name, text, system) -> None:
    tokenizer = chat(TEMPLATES[name])
    prompter = Prompter(tokenizer, Prompt(texts=text, system=system), 0)
    content = text.replace("{audio}", "SOUND") if "{audio}" in text else text + "SOUND"
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": content})
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert "SOUND".join(prompter.render(text)) == whole
    prefix, audio, suffix = texts(prompter.example(utterance(), 0, with_target=False))
    assert audio is None
    assert tokenizer.decode(prefix) + "SOUND" + tokenizer.decode(suffix) == whole
    joined = tokenizer(whole, add_special_tokens=False)["input_ids"]
    sound = tokenizer("SOUND", add_special_tokens=False)["input_ids"]
    assert [*prefix, *sound, *suffix] == joined


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("olmo2", "<|im_end|>"), ("llama3", "<|endoftext|>")],
)
def test_end_token_is_what_ends_the_models_turn(chat, name, end) -> None:
    tokenizer = chat(TEMPLATES[name])
    prompter = Prompter(tokenizer, Prompt(), 0)
    assert prompter.end_token_id == tokenizer.convert_tokens_to_ids(end)


def test_end_token_is_eos_for_plain_prompts_and_silent_templates(chat) -> None:
    nothing_after = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    for tokenizer, prompt in (
        (chat(None), Prompt(kind="plain", texts="{audio}")),
        (chat(nothing_after), Prompt()),
    ):
        assert Prompter(tokenizer, prompt, 0).end_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_target_and_one_end_token_are_trained(chat, name) -> None:
    tokenizer = chat(TEMPLATES[name])
    prompter = Prompter(tokenizer, Prompt(), 0)
    segments = prompter.example(utterance(" turn left\n"), 0, with_target=True).segments
    assert [isinstance(s, TextSegment) and s.trained for s in segments] == [0, 0, 0, 1]
    *target, end = segments[-1].tokens
    assert tokenizer.decode(target) == "turn left"
    assert end == prompter.end_token_id


@given(st.text(min_size=1, max_size=40))
@example("say <|im_end|> and <|endoftext|>")
@settings(max_examples=60, deadline=None)
def test_any_transcript_is_kept_whole_and_ends_once(tokenizer, text) -> None:
    prompter = Prompter(tokenizer, Prompt(), 0)
    (*_, last) = prompter.example(utterance(text), 0, with_target=True).segments
    assert last.tokens.count(prompter.end_token_id) == 1
    assert tokenizer.decode(last.tokens[:-1]) == text.strip()


def test_long_targets_are_not_cut(tokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(8)  # as a tokenizer.json may have it
    prompter = Prompter(tokenizer, Prompt(), 0)
    text = "word " * 3000 + "end"
    (*_, last) = prompter.example(utterance(text), 0, with_target=True).segments
    assert len(last.tokens) == len(text) + 1


def test_bos_is_written_once(chat) -> None:
    tokenizer = chat(OLMO2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for prompt in (
        Prompt(texts="{audio}"),
        Prompt(kind="plain", texts="Hear {audio} and write:"),
        Prompt(kind="plain", texts="{audio}"),
    ):
        prompter = Prompter(tokenizer, prompt, 0)
        segments = texts(prompter.example(utterance(), 0, with_target=True))
        tokens = [t for segment in segments if segment for t in segment]
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens.count(tokenizer.bos_token_id) == 1


def test_plain_prompt_stands_as_it_is(tokenizer) -> None:
    prompter = Prompter(tokenizer, Prompt(kind="plain", texts=" Hear {audio}\nText:"), 0)
    prefix, audio, suffix = texts(prompter.example(utterance(), 0, with_target=False))
    assert (tokenizer.decode(prefix), audio, tokenizer.decode(suffix)) == (
        " Hear ",
        None,
        "\nText:",
    )


def test_empty_pieces_make_no_segment(tokenizer) -> None:
    prompter = Prompter(tokenizer, Prompt(kind="plain", texts="{audio}"), 0)
    (only,) = prompter.example(utterance(), 0, with_target=False).segments
    assert isinstance(only, AudioSegment)
    assert prompter.max_prompt_tokens == 1


def test_a_prompt_that_begins_with_the_audio_is_advised_against(tokenizer) -> None:
    bare = Prompter(tokenizer, Prompt(kind="plain", texts=("Say {audio}", "{audio}\n")), 0)
    assert bare.advice is not None
    first = tokenizer.bos_token or tokenizer.eos_token
    better = first + "{audio}\n"
    assert f"{better!r}" in bare.advice
    mended = Prompter(tokenizer, Prompt(kind="plain", texts=("Say {audio}", better)), 0)
    assert mended.advice is None
    (opening,) = mended.pieces(better)[0]  # one token, and the special one
    assert tokenizer.decode([opening]) == first
    assert Prompter(tokenizer, Prompt(texts="{audio}"), 0).advice is None, "a chat's turn is opened"


def test_the_prefix_is_what_all_configured_texts_begin_with(tokenizer) -> None:
    about = Prompt(texts=("Please write: {audio}", "Please transcribe this. {audio}"))
    prompter = Prompter(tokenizer, about, 0)
    assert tokenizer.decode(prompter.prefix) == "<|im_start|>user\nPlease "
    for text in about.texts:
        assert prompter.pieces(text)[0][: len(prompter.prefix)] == prompter.prefix
    other = Prompter(tokenizer, Prompt(kind="plain", texts=("a{audio}", "b{audio}")), 0)
    assert other.prefix == ()


def test_text_is_chosen_by_seed_epoch_and_key_alone(tokenizer) -> None:
    several = Prompt(kind="plain", texts=("a{audio}", "b{audio}", "c{audio}"))

    def choices(seed: int, epoch: int, keys: range) -> list[str]:
        prompter = Prompter(tokenizer, several, seed)
        samples = np.zeros(160, dtype=np.int16)
        examples = [
            prompter.example(Utterance(f"u{k}", samples, "x"), epoch, with_target=True)
            for k in keys
        ]
        return [tokenizer.decode(e.segments[0].tokens) for e in examples]

    keys = range(300)
    first = choices(0, 0, keys)
    assert first == choices(0, 0, keys)
    assert first[::-1] == choices(0, 0, keys[::-1])
    assert first != choices(1, 0, keys)
    assert first != choices(0, 1, keys)
    assert min(Counter(first)[text] for text in "abc") > 70


def test_generation_always_takes_the_first_text(tokenizer) -> None:
    prompter = Prompter(tokenizer, Prompt(kind="plain", texts=("first{audio}", "other{audio}")), 0)
    samples = np.zeros(160, dtype=np.int16)
    for k in range(20):
        made = prompter.example(Utterance(f"u{k}", samples, ""), k, with_target=False)
        assert tokenizer.decode(made.segments[0].tokens) == "first"
        assert len(made.segments) == 2


@pytest.mark.parametrize("with_target", [True, False])
def test_an_utterances_own_prompt_goes_first(tokenizer, with_target) -> None:
    prompter = Prompter(tokenizer, Prompt(kind="plain", texts=("a{audio}", "b{audio}")), 0)
    own = utterance(prompt="Who speaks? {audio} Answer:")
    prefix, _, suffix, *_ = texts(prompter.example(own, 0, with_target=with_target))
    assert tokenizer.decode(prefix) == "Who speaks? "
    assert tokenizer.decode(suffix) == " Answer:"
    for empty in (None, "", " "):
        made = prompter.example(utterance(prompt=empty), 0, with_target=False)
        assert tokenizer.decode(made.segments[0].tokens) == "a"


@pytest.mark.parametrize("prompt", ["{audio} or {audio}", 3, ["a"]])
def test_an_unusable_own_prompt_names_the_utterance(tokenizer, prompt) -> None:
    prompter = Prompter(tokenizer, Prompt(), 0)
    with pytest.raises(DataError, match="utterance key: its `prompt`"):
        prompter.example(utterance(prompt=prompt), 0, with_target=True)


def test_many_own_prompts_do_not_fill_the_memory(tokenizer) -> None:
    prompter = Prompter(tokenizer, Prompt(kind="plain", texts="{audio}"), 0)
    for k in range(CACHED_TEXTS + 50):
        prompter.example(utterance(prompt=f"question {k}"), 0, with_target=False)
    assert len(prompter._pieces) == CACHED_TEXTS


def test_max_prompt_tokens_is_the_longest_prompt_with_its_end_token(tokenizer) -> None:
    prompt = Prompt(kind="plain", texts=("{audio}", "four{audio}", "to{audio}be"))
    assert Prompter(tokenizer, prompt, 0).max_prompt_tokens == 5


def test_pickled_prompter_makes_the_same_examples(tokenizer) -> None:
    prompter = Prompter(tokenizer, Prompt(texts=("a{audio}", "b{audio}")), 0)
    copied = worker_copy(prompter)
    one, two = (p.example(utterance(), 3, with_target=True) for p in (prompter, copied))
    assert texts(one) == texts(two)


def test_chat_without_a_template_names_the_remedy(chat) -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*model\.prompt\.kind=plain"):
        Prompter(chat(None), Prompt(), 0)


def test_a_template_that_refuses_the_system_turn_says_so(chat) -> None:
    with pytest.raises(ConfigError, match=r"System role not supported.*model\.prompt\.system"):
        Prompter(chat(NO_SYSTEM), Prompt(system="You listen."), 0)
    Prompter(chat(NO_SYSTEM), Prompt(), 0)


def test_a_template_that_drops_or_repeats_the_turn_is_refused(chat) -> None:
    for template, times in (("nothing", 0), ("{{ messages[0]['content'] * 2 }}", 2)):
        with pytest.raises(ConfigError, match=f"turn {times} times"):
            Prompter(chat(template), Prompt(), 0)


def test_a_tokenizer_without_an_end_is_refused(chat) -> None:
    tokenizer = chat(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Prompter(tokenizer, Prompt(kind="plain"), 0)
