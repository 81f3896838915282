from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import pytest
import soundfile
from make_shards import main
from source_files import write_lines, write_tone
from speech_files import tone, write_shards

from speechllm.data.index import open_corpus
from speechllm.data.store import Store
from speechllm.errors import DataError


@pytest.fixture
def kaldi(tmp_path: Path) -> Path:
    """Recordings as a file, as a pipe, and as a pipe that fails, in segments."""
    data = tmp_path / "data/train"
    write_tone(tmp_path / "audio/r0.flac", 2.0, seed=0)
    both = np.stack([tone(2.0, seed=1), tone(2.0, seed=2)], axis=1)
    soundfile.write(tmp_path / "audio/r1.sph", both, 16000, format="NIST", subtype="PCM_16")
    write_lines(
        data / "wav.scp",
        [
            f"r0 {tmp_path}/audio/r0.flac",
            f"r1 cat {tmp_path}/audio/r1.sph |",
            "r2 echo no disc >&2; exit 3 |",
        ],
    )
    spans = [(f"r{r}-{i}", f"r{r}", i * 0.5) for r in range(3) for i in range(3)]
    segments = [f"{name} {rec} {at:.2f} {at + 0.45:.2f} 0" for name, rec, at in spans]
    write_lines(data / "segments", [*segments, "r0-9 r0 1.50 2.60"])
    write_lines(data / "text", [f"{name} said in {name}" for name, *_ in spans] + ["r0-9 late"])
    write_lines(data / "utt2spk", [f"{name} {rec}" for name, rec, _ in spans] + ["r0-9 r0"])
    return data


def test_a_kaldi_directory_and_a_tar_become_shards(
    kaldi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_shards(tmp_path / "old", 3, seconds=(0.2, 0.4))
    sources = ["--source", f"kaldi:{kaldi},set.lang=cs", "--source", f"tar:{old}"]
    same = [*sources, "--num-workers", "1", "--shard-size", "30kB", "--allow-commands"]
    out, shared = tmp_path / "out", tmp_path / "shared"
    with pytest.raises(DataError, match=r"wav\.scp:2: a pipe .*--allow-commands"):
        main([*sources, "--out", str(out)])
    assert not out.exists()
    assert main([*same, "--out", str(out)]) == 0
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {one["id"]: one["reason"] for one in dropped} == {
        "r0-9": "bad segment",
        **{f"r2-{i}": "command failed" for i in range(3)},
    }
    failed = {one["detail"] for one in dropped if one["reason"] == "command failed"}
    assert failed == {"exit code 3: echo no disc >&2; exit 3: no disc"}
    corpus = open_corpus([str(out)])
    assert len(corpus) == 9
    read = {one.key: one for one in map(Store(corpus).read, range(9))}
    np.testing.assert_array_equal(read["r1-2"].samples, tone(2.0, seed=1)[16000:23200])
    assert read["r1-2"].text == "said in r1-2"
    assert read["r1-2"].fields["lang"] == "cs"
    assert read["r1-2"].fields["speaker"] == "r1"
    assert sum(key.startswith("utt-") for key in read) == 3
    # Tasks that run each command once, and elsewhere, make the same files.
    cache = ["--command-cache", str(tmp_path / "cache")]
    for task in ("2", "1"):
        arguments = [*same, *cache, "--out", str(shared), "--task", task, "--num-tasks", "2"]
        assert main(arguments) == 0
    assert main([*same, *cache, "--out", str(shared), "--check-complete"]) == 0
    tars = sorted(tar.name for tar in out.glob("*.tar"))
    assert len(tars) > 2
    assert [(shared / tar).read_bytes() for tar in tars] == [
        (out / tar).read_bytes() for tar in tars
    ]
    capsys.readouterr()
