"""The embedded model's tokenizer: byte-level BPE that splits text as Qwen2's does, with ChatML's tokens.

Every digit is a token of its own. What the runner's default prompt says around a puzzle is a few tokens, one
for each phrase that never changes (`PHRASES`): a prompt of two small examples is then 130 tokens, not 330.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from arc_puzzles.chat import PROMPT_VERSIONS

SEED = 8
VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last ids, in Qwen's order
_PROMPT = PROMPT_VERSIONS["output-from-examples-v0"]
_GRID = "```grid shape: "
PHRASES = (
    f"system\n{_PROMPT.system}",
    f"user\n{_PROMPT.introduction}\n\n### Example ",
    "assistant\n",
    f"\n\nInput:\n{_GRID}",
    f"\n```\n\nOutput:\n{_GRID}",
    "\n```\n\n### Example ",
    f"\n```\n\n### Test\n\nInput:\n{_GRID}",
    _GRID,
    "\n```",
    *(f"\n{number} " for number in range(1, 10)),  # what a row begins with
)

# What Qwen2 splits text into before merging: contractions, words with one leading mark or space, single
# digits, punctuation with its newlines, newlines, other white space.
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Text in the manner of the prompts, so that their words become few tokens.
PROSE = """\
system
You solve puzzles on coloured grids. Answer with the output grid only.
user
Each example shows an input grid and the output grid that one hidden rule makes of it.
Find the rule that explains every example, then apply it to the test input.
A grid is a rectangle of cells. Every cell is a digit from 0 to 9 that names
a colour; 0 is usually the background.
A grid has between 1 and 30 rows and between 1 and 30 columns.
The output may have another shape than the input.
Write the output grid in exactly the same format as the grids of the examples, and write nothing else.

### Example 1

Input:
Output:

### Example 2

Input:
Output:

### Test

Input:
Output:
assistant
Shapes may move, turn, grow, shrink, repeat, change colour, fall down, or fill the space that a line
encloses. Look at the objects in the grid: which cells belong together, which colours touch, where the
borders are, and what stays the same from the input to the output. Count the cells, the rows, the columns
and the objects. Compare the first example with the second example, and the second example with the third. A
rule that works for one pair and does not work for another pair is the wrong rule. The right rule works for
all of the pairs, and it is often short: mirror the grid, rotate the grid, keep the largest object, draw a
line between two cells of the same colour, remove the noise, complete the pattern, sort the columns by their
height, cut out the part inside the frame, copy the small shape to every marked cell, let the loose cells
fall to the bottom row, swap the two colours. The answer is the grid itself. Think about what the rule does
with the corners and with the edges of the grid. This is the training set. These are the test grids. There
is one test, or there are more tests than one. The shape of the grid is given before its rows; every row has
a number and then the digits of the row.
"""


def corpus() -> list[str]:
    """Returns the prose, and random grids in the formats that the encoders write."""
    rng = random.Random(SEED)
    texts = [PROSE]
    for _ in range(40):
        rows, columns = rng.randint(1, 12), rng.randint(1, 12)
        grid = [[str(rng.randrange(10)) for _ in range(columns)] for _ in range(rows)]
        plain = "\n".join("".join(row) for row in grid)
        separated = "\n".join("|".join(row) for row in grid)
        numbered = "\n".join(f"{i} {''.join(row)}" for i, row in enumerate(grid, start=1))
        shape = f"{rows}x{columns}"
        texts.append(
            f"user\nInput:\n```grid\n{plain}\n```\n\nOutput:\n```grid shape: {shape}\n{numbered}\n```\n"
        )
        texts.append(f"assistant\n{plain}\n\n{separated}\n")
    return texts


def train_tokenizer() -> tuple[dict, dict[str, int]]:
    """Returns the contents of `tokenizer.json`, and the ids of the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(PHRASES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ids = {token: VOCAB_SIZE - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
    assert all(tokenizer.token_to_id(token) == token_id for token, token_id in ids.items())
    return json.loads(tokenizer.to_str()), ids


def write_tokenizer(out: Path) -> dict[str, int]:
    """Writes `tokenizer.json` and `tokenizer_config.json`; returns the ids of the special tokens."""
    contents, ids = train_tokenizer()
    added = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in contents["added_tokens"]
    }
    _write_json(out / "tokenizer.json", contents)
    _write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    return ids


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
