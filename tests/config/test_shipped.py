"""Every YAML and JSON file that is shipped loads, and the presets say what their names say."""

import json
from pathlib import Path

import pytest

from speechllm.config.load import dump_config, load_config
from speechllm.config.model import FilterbankEncoder
from speechllm.strategy.zero_config import read_zero_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("**/*.y*ml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("**/*.json"))
PRESETS = {
    "whisper-small.en_olmo2-1b_pre_norm": {},
    "whisper-small.en_olmo2-1b_post_norm": {"norm_first": False},
    "whisper-small.en_olmo2-1b_down4": {"downsampling_factor": 4},
    "whisper-small.en_olmo2-1b_down8": {"downsampling_factor": 8},
    "whisper-small.en_llama3.2-1b": {},
    "whisper-large-v3_olmo2-1b_pre_norm": {},
    "whisper-large-v3_olmo2-1b_post_norm": {"norm_first": False},
    "whisper-large-v3_olmo2-1b_final_norm": {"add_final_norm": True},
    "fbank_olmo2-1b": {},
}
HUB_IDS = {
    "whisper-small.en": "openai/whisper-small.en",
    "whisper-large-v3": "openai/whisper-large-v3",
    "olmo2-1b": "allenai/OLMo-2-0425-1B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_config_loads(file, tmp_path):
    config = load_config(str(file))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_every_deepspeed_config_is_read():
    names = {"zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"}
    assert {file.name for file in DS_CONFIGS} == names
    for file in DS_CONFIGS:
        assert read_zero_config(str(file)) == json.loads(file.read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_their_names_say(name):
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"))
    encoder, llm = name.split("_")[:2]
    if encoder == "fbank":
        assert config.model.encoder == FilterbankEncoder(mels=80, hidden_size=768)
    else:
        assert config.model.encoder.id == HUB_IDS[encoder]
    assert config.model.llm.id == HUB_IDS[llm]
    expected = {
        "downsampling_factor": 6,
        "hidden_size": 1024,
        "num_layers": 2,
        "num_heads": 16,
        "intermediate_size": 4096,
        "norm_first": True,
        "add_final_norm": False,
        "use_positional_embeddings": False,
        "dropout": 0.1,
    }
    assert config.model.connector.model_dump(exclude={"kind"}) == expected | PRESETS[name]
    assert config.run_dir == f"exp/{name}"
    assert (config.optim.lr, config.optim.weight_decay, config.seed) == (1e-4, 5e-4, 42)
    steps = {"whisper-large-v3": (5_000, 100), "fbank": (30_000, 2_000)}.get(encoder, (15_000, 500))
    assert (config.train.steps, config.optim.warmup_steps) == steps


@pytest.mark.parametrize("name", PRESETS)
def test_presets_step_over_about_48_utterances_of_ten_seconds(name):
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"))
    audio = -(-500 // config.model.connector.downsampling_factor)
    text = 150 / config.data.characters_per_token
    per_microbatch = config.data.microbatch_tokens // (audio + 20 + text)
    assert 46 <= per_microbatch * config.data.microbatches_per_step <= 52
