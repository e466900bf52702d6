"""Problems made of a real model's last hidden states, its LM head and the tokens that came next.

Left out: training-time hidden states and other models than Hugging Face causal LMs whose logits are
`hidden @ weight.T`, soft-capped or not; anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import IGNORE_INDEX, Problem, prompt_rows
from benchmarks.rows import ROOT
from benchmarks.shapes import Shape

_WINDOW = 512


def model_shape(folder: str, num_rows: int) -> Shape:
    """The shape of a model's head, from its config.json. ValueError if there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"model {folder!r}: no {path}")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    name = f"{Path(folder).name}:{num_rows}"
    return Shape(name, num_rows, config["hidden_size"], config["vocab_size"])


@torch.no_grad()
def model_problem(
    folder: str,
    data: str | None,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    ignored: float,
) -> Problem:
    """Hidden states of the first num_rows tokens of the text, in windows of 512 tokens.

    The model runs in float32; hidden states and head are rounded to `dtype`. data: a file of text,
    or .jsonl whose string values are joined; README.md by default. ValueError if the text is too
    short or the model's logits are not those of its head.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    ids: list[int] = []
    for text in _texts(Path(data) if data is not None else ROOT / "README.md"):
        ids += tokenizer(text).input_ids
        if len(ids) > num_rows:
            break
    if len(ids) <= num_rows:
        raise ValueError(f"data {data!r}: {len(ids)} tokens, needs {num_rows + 1}")
    tokens = torch.tensor(ids[: num_rows + 1], device=device)
    hidden = torch.cat(
        [
            model.base_model(window[None]).last_hidden_state[0]
            for window in tokens[:-1].split(_WINDOW)
        ]
    )
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    target = tokens[1:].clone()
    target[prompt_rows(num_rows, ignored, seed=0).to(device)] = IGNORE_INDEX
    weight: Tensor = head.weight.detach()
    problem = Problem(
        Shape(f"{Path(folder).name}:{num_rows}", num_rows, *reversed(weight.shape)),
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).clone().requires_grad_(),
        target,
        seed=0,
        kind=f"hidden states of {Path(folder).name}",
        bias=None if head.bias is None else head.bias.detach().to(dtype).requires_grad_(),
        softcap=softcap,
    )
    window = tokens[:-1][:_WINDOW]
    made = problem.logits(hidden[: len(window)], weight, head.bias)
    if not torch.allclose(made, model(window[None]).logits[0].float(), rtol=1e-3, atol=1e-3):
        raise ValueError(f"model {folder!r}: its logits are not softcap(hidden @ weight.T + bias)")
    return problem


def _texts(path: Path) -> Iterator[str]:
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        yield content
        return
    for line in content.splitlines():
        record: dict[str, Any] = json.loads(line)
        yield "".join(value for value in record.values() if isinstance(value, str))
