"""The page about rows says what is true: its blocks, run from top to bottom, give the rows of the store."""

import re
from pathlib import Path
from typing import Any

import pytest
from activation_fakes import batch, settings

from activation_store import ActivationWriter, hook_name
from arc_runner.data import EXAMPLE_MODEL

PAGE = Path(__file__).parents[2] / "docs" / "rows.md"


def write_store() -> None:
    of = settings(hook_names=tuple(map(hook_name, range(10, 24))), hidden_size=64)
    with ActivationWriter("activations", of, provenance={}) as writer:
        writer.submit(batch(*(f"t{number}" for number in range(12)), of=of))


@pytest.mark.filterwarnings("ignore:os.fork")
def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    for library in ("pandas", "torch", "datasets"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    write_store()
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, Any] = {}
    for block in blocks:
        text = block.replace("arc_runner/data/tiny-qwen2", str(EXAMPLE_MODEL))
        text = text.replace("num_workers=2", "num_workers=0")  # this process has used JAX: it may not fork
        exec(compile(text, PAGE.name, "exec"), names)
    store = names["store"]
    assert len(names["X"]) == sum(record.n_rows for record in store)
    assert names["windows"] == len(names["X"]) // 8
    assert names["stacked"].shape[1] == 2
    assert names["tokens"]["finish_reason"].notna().all()
    assert all(len(line) < 2000 for line in capsys.readouterr().out.splitlines())
