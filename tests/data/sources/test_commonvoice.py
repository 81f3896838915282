from __future__ import annotations

from pathlib import Path

import numpy as np

import pytest
import soundfile
from source_files import Corpus, write_lines, write_tone

from speechllm.data.audio import decode_audio
from speechllm.errors import DataError

HEADER = (
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\t"
    "accents\tvariant\tlocale\tsegment"
)


@pytest.fixture
def czech(tmp_path: Path) -> Path:
    folder = tmp_path / "cv-corpus-17.0/cs"
    for i in range(2):
        write_tone(folder / f"clips/common_voice_cs_{i}.mp3", 0.5, seed=i, rate=32000)
    write_lines(
        folder / "validated.tsv",
        [
            HEADER,
            'c0\tcommon_voice_cs_0.mp3\tx1\t"Ahoj," řekl.\t\t2\t0\ttwenties\tfemale_feminine\t\t\t'
            "cs\t",
            "c1\tcommon_voice_cs_1.mp3\tx2\tDobře.\thealth\t2\t0\t\t\tMoravian\t\tcs\t",
        ],
    )
    return folder


def test_validated_clips(czech: Path) -> None:
    corpus = Corpus(f"commonvoice:{czech}")
    assert corpus.texts == {"common_voice_cs_0": '"Ahoj," řekl.', "common_voice_cs_1": "Dobře."}
    fields = {"speaker": "c0", "lang": "cs", "gender": "female_feminine", "age": "twenties"}
    assert corpus["common_voice_cs_0"].fields == fields
    assert corpus["common_voice_cs_1"].fields == {
        "speaker": "c1",
        "lang": "cs",
        "accent": "Moravian",
        "domain": "health",
    }
    assert corpus.manifest.name == "cs-validated"
    mp3 = (czech / "clips/common_voice_cs_1.mp3").read_bytes()
    np.testing.assert_array_equal(corpus.samples("common_voice_cs_1"), decode_audio(mp3, "mp3"))
    assert len(soundfile.read(czech / "clips/common_voice_cs_1.mp3")[0]) == 16000


@pytest.mark.parametrize("spec", ["{},tsv=train", "{},tsv=train.tsv", "{}/train.tsv"])
def test_another_list_and_the_columns_of_old_releases(czech: Path, spec: str) -> None:
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent"
    write_lines(czech / "train.tsv", [header, "c\tcommon_voice_cs_0\tAno\t2\t0\t\t\tx"])
    corpus = Corpus(f"commonvoice:{spec.format(czech)}")
    assert corpus["common_voice_cs_0"].fields == {"speaker": "c", "accent": "x"}
    assert len(corpus.samples("common_voice_cs_0")) == 8000


def test_what_is_wrong_is_named(czech: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; .*cs has validated\.tsv"):
        Corpus(f"commonvoice:{czech},tsv=dev")
    with pytest.raises(DataError, match="the directory of one language"):
        Corpus(f"commonvoice:{czech.parent}")
    write_lines(czech / "validated.tsv", ["client_id\tpath", "a\tb"])
    with pytest.raises(DataError, match=r"validated\.tsv:1: no column `sentence`"):
        Corpus(f"commonvoice:{czech}")
    write_lines(czech / "validated.tsv", [HEADER, "a\tb"])
    with pytest.raises(DataError, match=r"validated\.tsv:2: 2 cells"):
        Corpus(f"commonvoice:{czech}")
    write_lines(czech / "validated.tsv", [HEADER, "c" + "\t" * 12])
    with pytest.raises(DataError, match=r"validated\.tsv:2: `path` is empty"):
        Corpus(f"commonvoice:{czech}")
    (czech / "validated.tsv").write_text("")
    with pytest.raises(DataError, match=r"validated\.tsv: no lines"):
        Corpus(f"commonvoice:{czech}")
