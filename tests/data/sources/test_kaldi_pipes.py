from __future__ import annotations

from pathlib import Path

import pytest

from speechllm.data.sources.kaldi_pipes import plain_file


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("flac -c -d -s /a/b.flac", ("/a/b.flac", None)),
        ("/usr/bin/flac -cds 'a b.FLAC'", ("a b.FLAC", None)),
        ("flac --stdout --decode --silent b.flac", ("b.flac", None)),
        ("flac -c -d -s --skip=7 b.flac", None),
        ("flac -c -s b.flac", None),
        ("flac -c -d b.flac c.flac", None),
        ("flac -c -d -s b.flac | sox - -t wav -", None),
        ("/k/tools/sph2pipe -f wav -p -c 1 x.sph", ("x.sph", 0)),
        ("sph2pipe -f wav -c 2 x.sph", ("x.sph", 1)),
        ("sph2pipe x.sph", ("x.sph", None)),
        ("sph2pipe -f wav -t 1:2 x.sph", None),
        ("sph2pipe -f raw x.sph", None),
        ("sph2pipe -f wav -c 3 x.sph", None),
        ("sph2pipe -f wav $X.sph", None),
        ("sox x.wav -t wav -", None),
        ("flac -c -d -s 'b.flac", None),
        ("", None),
    ],
)
def test_commands_that_only_decode(command: str, wanted: tuple[str, int | None] | None) -> None:
    assert plain_file(command, "/", has_tools=True) == wanted


def test_shortened_sphere_files_are_left_to_sph2pipe_where_it_may_run(tmp_path: Path) -> None:
    header = b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n"
    (tmp_path / "x.sph").write_bytes(header)
    assert plain_file("sph2pipe -f wav x.sph", str(tmp_path), has_tools=True) is None
    assert plain_file("sph2pipe -f wav x.sph", str(tmp_path), has_tools=False) == ("x.sph", None)
