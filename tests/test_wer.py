import json
import random
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.errors import UserError
from speechllm.wer import experiment_names, frequent_errors, read_predictions, score, wer_command

REFS = ["the cat sat on the mat", "hello world", "one two three"]
HYPS = ["the cat sat on mat", "hello there world", "one too three"]


def test_counts_and_rates_of_a_known_corpus():
    assert score(REFS, HYPS, "none") == {
        "wer": 3 / 11,
        "cer": (4 + 6 + 1) / (22 + 11 + 13),
        "ser": 1.0,
        "substitutions": 1,
        "deletions": 1,
        "insertions": 1,
        "hits": 9,
        "words": 11,
        "utterances": 3,
    }


def test_rates_are_of_the_corpus_not_means_of_utterances():
    assert score(["a b c d e f g h i", "x"], ["a b c d e f g h i", "y"], "none")["wer"] == 0.1


def test_normalizer_is_applied_to_both_texts():
    assert score(["The colour, 25!"], ["the color twenty five"])["wer"] == 0.0
    assert score(["The colour"], ["the color"], "none")["wer"] == 1.0
    assert score(["The colour!"], ["the color"], "basic")["wer"] == 0.5


def test_empty_references_count_as_insertions():
    result = score(["", "a b"], ["x y", "a b"], "none")
    assert (result["insertions"], result["words"], result["wer"], result["ser"]) == (2, 2, 1.0, 0.5)
    result = score(["", ""], ["x y", ""], "none")
    assert (result["insertions"], result["words"], result["wer"]) == (2, 0, 2.0)
    assert score([], [], "none")["utterances"] == 0


def test_empty_hypotheses_are_deletions():
    result = score(["a b", "c"], ["", ""], "none")
    assert (result["deletions"], result["wer"], result["cer"]) == (3, 1.0, 1.0)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(UserError, match="2 references but 1 hypotheses"):
        score(["a", "b"], ["a"])


def _edits(ref, hyp):
    row = list(range(len(hyp) + 1))
    for i, said in enumerate(ref, start=1):
        above, row = row, [i]
        for j, heard in enumerate(hyp, start=1):
            row.append(min(above[j - 1] + (said != heard), above[j] + 1, row[j - 1] + 1))
    return row[-1]


words = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_equals_edit_distance(pairs):
    refs = [" ".join(ref) for ref, _ in pairs]
    hyps = [" ".join(hyp) for _, hyp in pairs]
    result = score(refs, hyps, "none")
    total = sum(len(ref) for ref, _ in pairs)
    assert (
        result["words"] == total == result["hits"] + result["substitutions"] + (result["deletions"])
    )
    assert result["wer"] == sum(_edits(ref, hyp) for ref, hyp in pairs) / max(1, total)
    characters = sum(map(len, refs))
    assert result["cer"] == sum(map(_edits, refs, hyps)) / max(1, characters)


def _corpus(seed):
    """Sentences of distinct words with known errors, far enough apart that no alignment ties."""
    rng = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(400)]
    refs, hyps = [], []
    for _ in range(120):
        said = rng.sample(vocabulary, rng.randint(8, 24))
        heard = list(said)
        for place in range(len(said) - 2, 1, -4):
            match rng.choice(["hit", "substitute", "delete", "insert"]):
                case "substitute":
                    heard[place] = f"x{rng.randrange(50)}"
                case "delete":
                    del heard[place]
                case "insert":
                    heard.insert(place, f"y{rng.randrange(50)}")
        refs.append(" ".join(said))
        hyps.append(" ".join(heard))
    return refs, hyps


def test_equals_nist_sclite(tmp_path):
    sclite = [shutil.which("sclite")] if shutil.which("sclite") else ["sctk", "sclite"]
    if not shutil.which(sclite[0]):
        pytest.skip("sctk is not installed")
    refs, hyps = _corpus(seed=7)
    for name, texts in (("ref", refs), ("hyp", hyps)):
        lines = [f"{text} (speaker_{number:04d})\n" for number, text in enumerate(texts)]
        (tmp_path / f"{name}.trn").write_text("".join(lines))
    command = [*sclite, "-r", "ref.trn", "trn", "-h", "hyp.trn", "trn", "-i", "rm", "-o", "rsum"]
    subprocess.run(
        [*command, "stdout"], cwd=tmp_path, check=True, stdout=(tmp_path / "out").open("w")
    )
    row = re.search(r"Sum\s*\|\s*([\d\s]+)\|([\d\s]+)", (tmp_path / "out").read_text())
    sentences, total = map(int, row[1].split())
    correct, substituted, deleted, inserted, errors, wrong = map(int, row[2].split())
    assert min(substituted, deleted, inserted) > 20
    ours = score(refs, hyps, "none")
    assert ours["utterances"] == sentences
    assert ours["words"] == total
    assert ours["hits"] == correct
    assert ours["substitutions"] == substituted
    assert ours["deletions"] == deleted
    assert ours["insertions"] == inserted
    assert ours["wer"] == errors / total
    assert ours["ser"] == wrong / sentences


def test_most_frequent_confusions():
    refs = ["a b c", "a b", "a"]
    hyps = ["x b c", "x", "a q"]
    assert frequent_errors(refs, hyps, "none", limit=2)[0] == (2, "a", "x")
    assert frequent_errors(["a b", "b"], ["b", "b c"], "none") == [(1, "", "c"), (1, "a", "")]
    assert frequent_errors([], [], "none") == []


def _write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _rows(refs=REFS, hyps=HYPS):
    return [{"id": f"u{n}", "ref": r, "hyp": h} for n, (r, h) in enumerate(zip(refs, hyps))]  # noqa: B905


def test_reads_every_form(tmp_path):
    run = tmp_path / "exp" / "first"
    lines = _write_lines(run / "predictions" / "test.jsonl", _rows())
    splits = run / "test_predictions.json"
    splits.write_text(
        json.dumps({"dev": {"ids": ["a", "b", "c"], "labels": REFS, "predictions": HYPS}})
    )
    assert read_predictions(lines) == {"test": (REFS, HYPS)}
    assert read_predictions(str(splits)) == {"dev": (REFS, HYPS)}
    assert read_predictions(str(run)) == {"test": (REFS, HYPS)}
    shutil.rmtree(run / "predictions")
    assert read_predictions(str(run)) == {"dev": (REFS, HYPS)}
    splits.write_text(json.dumps({"dev": {"labels": ["a"], "predictions": ["b"]}}))
    assert read_predictions(str(splits)) == {"dev": (["a"], ["b"])}


def test_what_decoding_keeps_for_itself_is_no_split(tmp_path):
    """Slices stay beside the merged predictions; an interrupted decoding leaves its parts."""
    run = tmp_path / "run"
    _write_lines(run / "predictions" / ".test.slice1of2.jsonl", _rows())
    _write_lines(run / "predictions" / ".test.slice2of2.jsonl", [])
    _write_lines(run / "predictions" / ".dev.part0.jsonl", _rows())
    with pytest.raises(UserError, match=r"no predictions/\*\.jsonl.*`generate`"):
        read_predictions(str(run))
    with pytest.raises(UserError, match=r"no predictions/\*\.jsonl.*`generate`"):
        read_predictions(str(run / "predictions"))
    _write_lines(run / "predictions" / "test.jsonl", _rows())
    assert read_predictions(str(run)) == {"test": (REFS, HYPS)}
    assert read_predictions(str(run / "predictions")) == {"test": (REFS, HYPS)}


def test_the_metrics_of_a_run_are_no_predictions(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    _write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 5.0}])
    with pytest.raises(UserError, match=r"no predictions/\*\.jsonl.*`generate`"):
        read_predictions(str(tmp_path))
    splits = {"dev": {"labels": REFS, "predictions": HYPS}}
    (tmp_path / "test_predictions.json").write_text(json.dumps(splits))
    assert read_predictions(str(tmp_path)) == {"dev": (REFS, HYPS)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"ref": "a", "hyp": "b"}\n{"ref": "a", "hy',
            r"a\.jsonl:2: not a line of JSON",
        ),
        ("a.jsonl", '{"ref": "a"}\n', r"a\.jsonl:1: 'hyp' must be text, got None"),
        ("a.jsonl", '\n{"ref": 3, "hyp": "b"}\n', r"a\.jsonl:2: 'ref' must be text, got 3"),
        ("a.jsonl", '["a", "b"]\n', r"a\.jsonl:1: expected"),
        ("a.jsonl", "", r"a\.jsonl: no predictions"),
        (
            "a.jsonl",
            '{"id": 1, "ref": "a", "hyp": "b"}\n{"id": 1, "ref": "c", "hyp": "d"}\n',
            r"a\.jsonl:2: id 1 stands in line 1 already",
        ),
        ("a.json", '{"test": {\n"labels": [}', r"a\.json:2: not JSON"),
        ("a.json", "[]", r"a\.json: expected"),
        ("a.json", "{}", r"a\.json: expected"),
        ("a.json", '{"test": []}', r"split 'test': 'labels' must be a list of texts"),
        ("a.json", '{"test": {"labels": ["a"]}}', r"'predictions' must be a list of texts"),
        (
            "a.json",
            '{"test": {"labels": ["a", null], "predictions": ["a", "b"]}}',
            r"'labels' must be a list of texts",
        ),
        (
            "a.json",
            '{"test": {"labels": ["a", "b"], "predictions": ["a"]}}',
            r"split 'test': 2 labels but 1 predictions",
        ),
    ],
)
def test_bad_predictions_name_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_predictions(str(tmp_path / name))


def test_missing_predictions(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_predictions(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"no predictions/\*\.jsonl.*`generate`"):
        read_predictions(str(tmp_path))
    (tmp_path / "latin.json").write_bytes('{"test": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.json: cannot be read as text"):
        read_predictions(str(tmp_path / "latin.json"))


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"ref": "a\u2028b", "hyp": "c"}, ensure_ascii=False) + "\n")
    assert read_predictions(str(file)) == {"a": (["a\u2028b"], ["c"])}


def test_table_of_several_experiments(tmp_path):
    first = _write_lines(tmp_path / "first" / "predictions" / "test.jsonl", _rows())
    second = _write_lines(tmp_path / "second" / "predictions" / "dev.jsonl", _rows(REFS, REFS))
    assert wer_command([first, second], "none").splitlines() == [
        "experiment  split    WER    CER     SER  S  D  I  words  utts",
        "first       test   27.27  23.91  100.00  1  1  1     11     3",
        "second      dev     0.00   0.00    0.00  0  0  0     11     3",
    ]
    listed = wer_command([first], "none", errors=1)
    assert listed.endswith("\n\nfirst test: said -> recognised\n     1  (nothing) -> there")


def test_names_are_paths_where_they_would_clash():
    assert experiment_names(["exp/a/test_predictions.json", "exp/b/predictions/x.jsonl"]) == [
        "a",
        "b",
    ]
    clash = ["exp/a/predictions/x.jsonl", "exp/a/predictions/y.jsonl"]
    assert experiment_names(clash) == clash
    assert experiment_names(["x.jsonl"]) == ["x.jsonl"]


def test_json_has_exactly_the_promised_keys(tmp_path):
    file = _write_lines(tmp_path / "test.jsonl", _rows())
    result = json.loads(wer_command([file], "none", as_json=True))
    assert result == {file: {"test": score(REFS, HYPS, "none")}}
    assert list(result[file]["test"]) == [
        *("wer", "cer", "ser", "substitutions", "deletions", "insertions", "hits"),
        *("words", "utterances"),
    ]
