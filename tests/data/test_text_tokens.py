from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from transformers import AutoTokenizer

import pytest
from speech_files import make_sample, write_shards

from speechllm.config.model import Prompt
from speechllm.data import text_tokens
from speechllm.data.index import open_corpus
from speechllm.data.prompt import Prompter
from speechllm.data.selection import TextTokens
from speechllm.data.shards import write_shard
from speechllm.data.store import Store
from speechllm.data.text_tokens import count_texts
from speechllm.errors import DataError
from speechllm.model.tiny import build_tiny_llm
from speechllm.types import TextSegment, Utterance

TEXTS = ("Say: {audio}", "{audio}\nWrite down what was said.")


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    directory = tmp_path_factory.mktemp("llm") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_llm(directory))
    return Prompter(tokenizer, Prompt(texts=TEXTS), 0)


def text_positions(prompter: Prompter, utterance: Utterance, epoch: int = 0) -> int:
    example = prompter.example(utterance, epoch, with_target=True)
    return sum(len(s.tokens) for s in example.segments if isinstance(s, TextSegment))


@pytest.fixture
def corpus_directory(tmp_path: Path) -> Path:
    """Three shards, the second without utterances, with own prompts, strange texts and one without
    a text that can be read."""
    texts = ["one two", "  naïve café 東京 ", "<|endoftext|> is text", "", "x" * 900]
    own = [None, "Own words, twice: {audio} and {audio}", "Own words: {audio}.", None, " "]
    samples = [
        make_sample(f"utt-{i}", text, 0.2, seed=i, **({} if prompt is None else {"prompt": prompt}))
        for i, (text, prompt) in enumerate(zip(texts, own, strict=True))
    ]
    (tmp_path / "shards").mkdir()
    for shard, part in enumerate((samples[:3], [], samples[3:])):
        write_shard(str(tmp_path / "shards" / f"{shard}.tar"), part)
    return tmp_path / "shards"


def test_counts_are_those_of_the_examples(corpus_directory: Path, prompter: Prompter) -> None:
    corpus = open_corpus([str(corpus_directory)])
    found = count_texts(corpus, [prompter], 3.0)
    store = Store(corpus)
    for i in range(len(corpus)):
        utterance = store.read(i)
        if i == 1:  # its prompt has two audios, so it is no example
            with pytest.raises(DataError):
                prompter.example(utterance, 0, with_target=True)
            continue
        for epoch in range(3):
            number = prompter.text_number(utterance.key, epoch)
            prompt = found.prompts[i] or prompter.prompt_tokens[number]
            assert text_positions(prompter, utterance, epoch) == found.targets[i] + prompt
    assert (found.prompts > 0).tolist() == [False, False, True, False, False]
    assert found.targets.dtype == found.prompts.dtype == np.int32


def test_each_shard_has_its_prompter(corpus_directory: Path, prompter: Prompter) -> None:
    corpus = open_corpus([str(corpus_directory)])
    tokenizer = prompter._tokenizer
    wordy = Prompter(tokenizer, Prompt(texts=TEXTS, system="You hear very well."), 0)
    plain = count_texts(corpus, [prompter], 3.0)
    first = count_texts(corpus, [wordy, prompter, prompter], 3.0)
    last = count_texts(corpus, [prompter, prompter, wordy], 3.0)
    assert first.prompts[2] > plain.prompts[2] == last.prompts[2]
    for one in (first, last):
        assert one.targets.tolist() == plain.targets.tolist()


def test_what_cannot_be_read_is_estimated(tmp_path: Path, prompter: Prompter) -> None:
    shard = write_shards(tmp_path / "s", 3, texts=["one two", "six letters", "three"])
    tar = shard / "train-000000.tar"
    damaged = tar.read_bytes().replace(b'"six letters"', b"[six letters]")
    tar.write_bytes(damaged)
    found = count_texts(open_corpus([str(shard)]), [prompter], 4.0)
    assert found.targets.tolist() == [len("one two"), -(-len("six letters") // 4), len("three")]


def test_a_node_counts_once_and_anew_what_has_changed(
    tmp_path: Path, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(text_tokens, "_SHARED", 2)
    shard = write_shards(tmp_path / "s", 3, texts=["one two", "six letters", "three"])
    corpus = open_corpus([str(shard)])
    counted = []
    original = Prompter.target_tokens

    def counting(self: Prompter, texts: list[str]) -> list[int]:
        counted.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(Prompter, "target_tokens", counting)
    first, again = (count_texts(corpus, [prompter], 3.0) for _ in range(2))
    assert counted == [3]
    assert again.targets.tolist() == first.targets.tolist() == [7, 11, 5]
    assert again.digest == first.digest
    os.utime(shard / "train-000000.tar", ns=(1, 1))
    count_texts(open_corpus([str(shard)]), [prompter], 3.0)
    assert counted == [3, 3]
    other = Prompter(prompter._tokenizer, Prompt(texts="Another: {audio}"), 0)
    count_texts(open_corpus([str(shard)]), [other], 3.0)
    assert counted == [3, 3, 3]


def test_the_digest_tells_counts_apart() -> None:
    counts = np.arange(4, dtype=np.int32)
    digests = [TextTokens(a, b).digest for a, b in ((counts, counts[::-1]), (counts[::-1], counts))]
    assert digests[0] != digests[1]
