"""Write a seeded random checkpoint of a real shape in Hugging Face layout: real work, no download.

    python examples/make_random_checkpoint.py OUT_DIR                     # 0.5B, bfloat16: 1 GB
    python examples/make_random_checkpoint.py OUT_DIR --shape qwen2.5-7b  # 15 GB in 4 shards

The weights are lively (see checkpoint_writer.py). The tokenizer is the tiny example's unless `--tokenizer`
names the directory of another one; its ids are below 512, so they are valid for every shape. The ids of the
special tokens in `config.json` are the tokenizer's. Memory needed: one shard.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from checkpoint_writer import DTYPES, qwen2_config, qwen3_config, write_checkpoint

from arc_runner.data import EXAMPLE_MODEL

TOKENIZER = EXAMPLE_MODEL
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

SHAPES = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a real Qwen shape.")
    parser.add_argument("out", type=Path, help="directory to write to: a new or an empty one")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--max-shard-gb", type=float, default=4.0, help="largest weight file, in GB of 10^9 bytes"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=TOKENIZER, help="directory with the tokenizer's files"
    )
    options = parser.parse_args()
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; it has to be 0 or more")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} exists and is not an empty directory")
    for name in TOKENIZER_FILES:
        if not (options.tokenizer / name).is_file():
            parser.error(f"--tokenizer {options.tokenizer} has no {name}")
    added = json.loads((options.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    token_ids = {token["content"]: token["id"] for token in added}
    if missing := {"<|endoftext|>", "<|im_end|>"} - set(token_ids):
        parser.error(f"--tokenizer {options.tokenizer} has no token {' and no token '.join(sorted(missing))}")

    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(options.tokenizer / name, options.out / name)
    make_config = qwen3_config if options.shape.startswith("qwen3") else qwen2_config
    config = make_config(**SHAPES[options.shape], dtype=options.dtype, token_ids=token_ids)
    files = write_checkpoint(options.out, config, options.seed, int(options.max_shard_gb * 1e9))
    size = sum(file.stat().st_size for file in files)
    seconds = time.perf_counter() - started
    print(
        f"{options.out}: {options.shape}, {len(files)} weight file(s), {size / 1e9:.2f} GB in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
