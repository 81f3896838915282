import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.config.load import dump_config, load_config
from speechllm.config.model import (
    Conv1dConnector,
    FilterbankEncoder,
    LinearConnector,
    MLPConnector,
    TransformerConnector,
    WhisperEncoder,
)
from speechllm.config.schema import Config
from speechllm.errors import ConfigError

MODELS = ["model.encoder.id=random:whisper", "model.llm.id=random:llama"]


def load(*overrides):
    return load_config(None, [*MODELS, *overrides])


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


def errors_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_importing_the_loader_imports_no_torch():
    code = (
        "import sys, speechllm.config.load; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_file_and_overrides(written):
    path = written(
        "model: {encoder: {id: e}, llm: {id: l}, connector: {num_layers: 3}}\n"
        "train: {steps: 7}\noptim:\n"
    )
    config = load_config(path, ["train.steps=9", "seed=5", "train.steps=11"])
    assert (config.train.steps, config.seed, config.model.connector.num_layers) == (11, 5, 3)
    assert config.optim == Config.model_fields["optim"].default


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("optim.lr=2e-3", lambda c: c.optim.lr, 0.002),
        ("optim.lr=1e-4", lambda c: c.optim.lr, 0.0001),
        ("optim.lr=.5", lambda c: c.optim.lr, 0.5),
        ("train.steps=20_000", lambda c: c.train.steps, 20_000),
        ("model.connector.norm_first=no", lambda c: c.model.connector.norm_first, False),
        ("model.connector.norm_first=off", lambda c: c.model.connector.norm_first, False),
        ("model.connector.norm_first=True", lambda c: c.model.connector.norm_first, True),
        ("run_dir=no", lambda c: c.run_dir, "no"),
        ("run_dir=123", lambda c: c.run_dir, "123"),
        ("run_dir=2024-01-01", lambda c: c.run_dir, "2024-01-01"),
        ("run_dir=12:30", lambda c: c.run_dir, "12:30"),
        ("run_dir=exp/a=b", lambda c: c.run_dir, "exp/a=b"),
        ("run_dir=null", lambda c: c.run_dir, None),
        ("run_dir=", lambda c: c.run_dir, None),
        ("run_dir='null'", lambda c: c.run_dir, "null"),
        ("model.llm.revision=0012345", lambda c: c.model.llm.revision, "0012345"),
        ("model.llm.revision=1e5", lambda c: c.model.llm.revision, "1e5"),
        ("data.train=dir", lambda c: c.data.train, ("dir",)),
        ("data.train=*.tar", lambda c: c.data.train, ("*.tar",)),
        ("data.train=[a, b c]", lambda c: c.data.train, ("a", "b c")),
        ("optim.betas=[0.8, 95e-2]", lambda c: c.optim.betas, (0.8, 0.95)),
        ("train={steps: 3, log_every: 2}", lambda c: (c.train.steps, c.train.log_every), (3, 2)),
        (
            "model.prompt.texts=Write: {audio}",
            lambda c: c.model.prompt.texts,
            ("Write: {audio}",),
        ),
        (
            'model.prompt.texts=["{audio} Write."]',
            lambda c: c.model.prompt.texts,
            ("{audio} Write.",),
        ),
    ],
)
def test_the_field_decides_what_a_value_is(override, get, value, written):
    assert get(load(override)) == value
    key, _, text = override.partition("=")
    if text[:1] not in "[{*" and ": " not in text:  # the same in a file
        *sections, name = key.split(".")
        lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate([*sections, name])]
        assert get(load_config(written("\n".join(lines) + f" {text}\n"), MODELS)) == value


def test_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("run_dir=~/exp", "data.train=[~/a, b]", "model.llm.id=~/llm")
    assert config.run_dir == "/home/me/exp"
    assert config.data.train == ("/home/me/a", "b")
    assert config.model.llm.id == "/home/me/llm"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.stpes=3"],
            "override train.stpes=3: train.stpes: no such key; did you mean train.steps?",
        ),
        (["trian.steps=3"], "override trian.steps=3: trian: no such key; did you mean train?"),
        (["lr=3"], "override lr=3: lr: no such key; did you mean optim.lr?"),
        (["train.schedule=cosine"], "train.schedule: no such key; did you mean optim.schedule?"),
        (
            ["generation.qqq=1"],
            "generation.qqq: no such key; there are max_new_tokens, num_beams, ",
        ),
        (["model.connector.hiden_size=3"], "did you mean model.connector.hidden_size?"),
        (
            ["model.connector.kind=linear", "model.connector.num_heads=3"],
            "model.connector.num_heads: no such key of kind linear; it belongs to transformer",
        ),
        (["train.seed=3"], "train.seed: no such key; write it without train."),
        (["train.steps=many"], "train.steps: expected a whole number, got 'many'"),
        (["train.steps=1.5"], "train.steps: expected a whole number, got '1.5'"),
        (["train.steps=0"], "train.steps: expected greater than or equal to 1, got '0'"),
        (["optim.lr=fast"], "optim.lr: expected a number, got 'fast'"),
        (["optim.lr=inf"], "optim.lr: expected a finite number, got 'inf'"),
        (["optim.lr=nan"], "optim.lr: expected a finite number, got 'nan'"),
        (["optim.betas=[0.9, 2]"], "optim.betas[1]: expected less than 1, got '2'"),
        (["optim.betas=0.9"], "optim.betas: expected a list, got '0.9'"),
        (["run_dir=[a]"], "run_dir: expected text, got ['a']"),
        (["model.connector.norm_first=maybe"], "expected true or false, got 'maybe'"),
        (
            ["model.prompt.texts=[]"],
            "model.prompt.texts: expected a list of at least 1 item, got []",
        ),
        (
            ["optim.schedule=lin"],
            "expected 'constant', 'cosine' or 'linear', got 'lin'; did you mean linear?",
        ),
        (
            ["model.connector.kind=mpl"],
            "override model.connector.kind=mpl: model.connector.kind: "
            "expected transformer, mlp, linear or conv1d, got 'mpl'; did you mean mlp?",
        ),
        (["model.connector=mlp"], "model.connector: expected a section of keys, got 'mlp'"),
        (["model.connector.kind=[a]"], "expected transformer, mlp, linear or conv1d, got "),
        (["train=3"], "override train=3: train: expected a section of keys, got '3'"),
        (
            ["train=3", "train.steps=3"],
            "train is '3', not a section, so train.steps=3 cannot be set",
        ),
        (
            ["model.connector.num_heads=7"],
            "model.connector: hidden_size 1024 is not a multiple of num_heads 7",
        ),
        (["evaluation.metric=wer"], "evaluation: metric: wer needs wer_utterances above 0"),
        (
            ["evaluation.patience=2", "evaluation.every=0"],
            "evaluation.patience needs evaluation.every",
        ),
        (
            ["data.min_seconds=9", "data.max_seconds=8"],
            "data: min_seconds 9.0 is above max_seconds 8.0",
        ),
        ([f"seed={2**64}"], "seed: expected less than or equal to 18446744073709551615, got "),
        (["data.microbatch_tokens=1e30"], "data.microbatch_tokens: expected a whole number, got "),
        ([f"data.microbatch_tokens={10**30}"], "data.microbatch_tokens: expected less than or "),
        ([f"data.microbatches_per_step={10**30}"], "data.microbatches_per_step: expected less "),
        ([f"data.window={10**30}"], "data.window: expected less than or equal to 2147483647, got "),
        (["collective_timeout=1e10"], "collective_timeout: expected less than or equal to 1000000"),
        (["run_dir=exp/M\udcfcller"], r"override 'run_dir=exp/M\udcfcller': not UTF-8"),
        (["steps"], "override 'steps': expected KEY=VALUE"),
        (["=3"], "override '=3': expected KEY=VALUE"),
        (["a..b=3"], "override 'a..b=3': expected KEY=VALUE"),
        (["data.train=[a"], "data.train=[a: the value starts like a YAML list"),
    ],
)
def test_bad_overrides(overrides, message):
    lines = errors_of(None, *MODELS, *overrides)
    assert len(lines) == 1
    assert message in lines[0]


def test_all_errors_at_once_each_with_its_line(written):
    path = written(
        "model:\n"
        "  encoder: {id: e, mels: 80}\n"
        "  llm:\n"
        "  connector:\n"
        "    num_layers: two\n"
        "    hiden_size: 3\n"
        "optim.lr: 3\n"
    )
    assert errors_of(path, "seed=-1") == [
        "override seed=-1: seed: expected greater than or equal to 0, got '-1'",
        f"{path}:2: model.encoder.mels: no such key of kind whisper; it belongs to fbank",
        f"{path}: model.llm.id is missing: Hub id, local directory, or `random:llama`, "
        "`random:olmo2`, `random:qwen2`.",
        f"{path}:5: model.connector.num_layers: expected a whole number, got 'two'",
        f"{path}:6: model.connector.hiden_size: no such key; did you mean "
        "model.connector.hidden_size?",
        f"{path}:7: optim.lr: no such key; write it as nested sections (optim: lr: ...)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": the file is empty"),
        ("# nothing\n", ": the file is empty"),
        ("- a\n- b\n", "expected `key: value` lines at the top level"),
        ("train:\n  steps: 3\n  steps: 4\n", ":3: train.steps stands twice, first in line 2"),
        ("seed: 1\ntrain: {}\nseed: 1\n", ":3: seed stands twice, first in line 1"),
        ("train:\n  steps: [3\nseed: 1\n", ":3:5: not valid YAML"),
        ("train:\n\tsteps: 3\n", ":2:1: not valid YAML"),
        ("run_dir: !!python/object/apply:os.system [ls]\n", ":1:10: not valid YAML"),
        ("? [a, b]\n: 3\n", ":1: a key must be a plain name"),
        ("model: &m\n  llm: *m\n", "model.llm is an alias of a section that holds it"),
        ("run_dir: \x07\n", "not valid YAML"),
    ],
)
def test_bad_files(written, text, message):
    path = written(text)
    lines = errors_of(path, *MODELS)
    assert len(lines) == 1
    assert lines[0].startswith(path)
    assert message in lines[0]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "demo.yaml").write_text("seed: 1\n")
    (tmp_path / "latin.yaml").write_bytes("run_dir: é\n".encode("latin-1"))
    missing = tmp_path / "dmo.yaml"
    assert errors_of(str(missing)) == [
        f"{missing}: no such file; did you mean {tmp_path / 'demo.yaml'}?"
    ]
    assert "no directory" in errors_of(str(tmp_path / "no" / "demo.yaml"))[0]
    assert "is a directory" in errors_of(str(tmp_path))[0]
    assert "cannot be read as text" in errors_of(str(tmp_path / "latin.yaml"))[0]


CONNECTOR = """
model:
  connector:
    kind: transformer
    hidden_size: 512
    num_heads: 8
    downsampling_factor: 4
"""


def test_another_kind_drops_the_files_keys_of_its_section(written):
    path = written(CONNECTOR)
    for order in (1, -1):
        overrides = ["model.connector.kind=mlp", "model.connector.dropout=0.3"][::order]
        config = load_config(path, [*MODELS, *overrides])
        assert config.model.connector == MLPConnector(dropout=0.3)
    config = load_config(
        written("model: {encoder: {id: e}}"), [*MODELS[1:], "model.encoder.kind=fbank"]
    )
    assert config.model.encoder == FilterbankEncoder()


def test_the_same_kind_keeps_the_files_keys(written):
    for text in (CONNECTOR, CONNECTOR.replace("    kind: transformer\n", "")):
        config = load_config(written(text), [*MODELS, "model.connector.kind=transformer"])
        assert config.model.connector == TransformerConnector(
            hidden_size=512, num_heads=8, downsampling_factor=4
        )


def test_kind_of_a_section_that_has_only_one_class_drops_nothing(written):
    path = written("model: {prompt: {texts: [hello]}}")
    config = load_config(path, [*MODELS, "model.prompt.kind=plain"])
    assert config.model.prompt.texts == ("hello",)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_order_of_keys_never_matters(tmp_path_factory, rng):
    def shuffled(tree):
        if not isinstance(tree, dict):
            return tree
        keys = rng.sample(list(tree), len(tree))
        return {key: shuffled(tree[key]) for key in keys}

    plain = load("model.connector.kind=conv1d", "optim.schedule=cosine", "seed=3")
    file = tmp_path_factory.mktemp("order") / "a.yaml"
    tree = shuffled(yaml.safe_load(dump_config(plain)))
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert load_config(str(file)) == plain


texts = st.text(st.characters(codec="utf-8", exclude_characters="~"), max_size=12)
fractions = st.floats(0, 1, exclude_max=True)
connectors = st.one_of(
    st.builds(
        TransformerConnector,
        hidden_size=st.integers(1, 64).map(lambda n: 16 * n),
        norm_first=st.booleans(),
        dropout=fractions,
    ),
    st.builds(MLPConnector, hidden_size=st.integers(1, 10**6)),
    st.builds(LinearConnector, downsampling_factor=st.integers(1, 64)),
    st.builds(Conv1dConnector, kernel_size=st.integers(1, 99)),
)
encoders = st.one_of(
    st.builds(WhisperEncoder, id=texts, revision=st.none() | texts | st.just("null")),
    st.builds(FilterbankEncoder, mels=st.integers(8, 256)),
)
configs = st.builds(
    lambda encoder, connector, llm, paths, run_dir, lr, beta, seed: Config.model_validate(
        {
            "run_dir": run_dir,
            "seed": seed,
            "model": {"encoder": encoder, "llm": {"id": llm}, "connector": connector},
            "data": {"train": paths},
            "optim": {"lr": lr, "betas": (beta, 0.99)},
        }
    ),
    encoders,
    connectors,
    texts | st.sampled_from(["1e5", "no", "12:30", "0x10", "<<", "=", "- a", "#x", "*a", "'"]),
    st.lists(texts, max_size=3),
    st.none() | texts,
    st.floats(1e-300, 1e300),
    fractions,
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=100, deadline=None)
@given(configs)
def test_dump_and_load_is_the_identity(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(file)) == config
