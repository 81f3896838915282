"""Files with random damage are read or refused with a DataError, never with anything else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import Corpus, write_lines, write_tone

from speechllm.errors import DataError

RECORDING = {
    "id": "r",
    "sources": [{"type": "file", "channels": [0, 1], "source": "r.wav"}],
    "sampling_rate": 16000,
    "num_samples": 1600,
    "duration": 0.1,
}
SUPERVISION = {"id": "s", "start": 0.0, "duration": 0.1, "channel": 0, "text": "x", "custom": {}}
CUT = {
    "id": "c",
    "start": 0,
    "duration": 0.1,
    "channel": 0,
    "supervisions": [SUPERVISION],
    "recording": RECORDING,
    "type": "MonoCut",
}
LINE = {"id": "a", "audio": "r.wav", "text": "x", "start": 0.0, "end": 1.5, "channel": 1}
HEADER = "client_id\tpath\tsentence\tlocale"
# kind: file that is damaged, its lines, the source
FILES = {
    "jsonl": ("m.jsonl", [LINE, {**LINE, "id": "b"}], "jsonl:{}/m.jsonl"),
    "csv": ("m.csv", ["id,audio,text,start", 'a,r.wav,"x, y",0.5'], "csv:{}/m.csv"),
    "tsv": ("m.tsv", ["id\taudio\ttext\tchannel", "a\tr.wav\tx\t0"], "tsv:{}/m.tsv"),
    "wav.scp": ("k/wav.scp", ["r x.ark:12", "q flac -cds 'a b.flac' |"], "kaldi:{}/k"),
    "segments": ("k/segments", ["u r 0.0 0.5 A", "v q 0.5 -1"], "kaldi:{}/k"),
    "text": ("k/text", ["u hello there", "v hi"], "kaldi:{}/k"),
    "transcript": ("l/1/2/1-2.trans.txt", ["1-2-0 A B", "1-2-1 C"], "librispeech:{}/l"),
    "speakers": ("l/SPEAKERS.TXT", ["; ID", "1 | F | x"], "librispeech:{}/l"),
    "validated": ("cs/validated.tsv", [HEADER, "c\tx.mp3\tAhoj\tcs"], "commonvoice:{}/cs"),
    "cuts": ("cuts.jsonl", [CUT], "lhotse:{}/cuts.jsonl"),
    "stm": ("a.stm", ["r A s 0.0 1.0 <o,f> { a / b } c"], "stm:{0}/a.stm,audio={0}"),
    "tdf": ("a.tdf", ["r.wav\t0\t0.0\t1.0\ts\tmale\t\tx"], "tdf:{0}/a.tdf,audio={0}"),
    "fisher": ("r.txt", ["# r", "0.10 1.00 A: x"], "fisher:{0}/r.txt,audio={0}"),
    "state": ("hf/state.json", [json.dumps({"_data_files": [{"filename": "a"}]})], "hf:{}/hf"),
    "splits": ("ds/dataset_dict.json", [json.dumps({"splits": ["a"]})], "hf:{}/ds,split=a"),
}
PIECES = [
    b"",
    b"\n",
    b"\t",
    b" ",
    b'"',
    b"{",
    b"}",
    b"|",
    b":",
    b"\xff",
    b"\0",
    b"-1",
    b"null",
    b"9",
]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    write_tone(root / "r.wav", 0.1)
    for name, lines, _ in FILES.values():
        write_lines(root / name, lines)
    return root


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_damage_is_refused_in_our_own_words(corpora: Path, name: str, data: st.DataObject) -> None:
    file, lines, spec = FILES[name]
    path = write_lines(corpora / file, lines)
    content = path.read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(content)))
        last = data.draw(st.integers(first, min(len(content), first + 8)))
        content = content[:first] + data.draw(st.sampled_from(PIECES)) + content[last:]
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        Corpus(spec.format(corpora))
    write_lines(path, lines)
