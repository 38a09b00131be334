"""Python that uses an exported model, for its card."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from engine.models.hub import AUTO_CLASSES, Head, init_arguments
from engine.train.portable import MODULES

LOAD = """\
import torch
from transformers import {names}

folder = "."  # this folder, or the name under which it is published
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder{arguments})
"""
STATES = """\
texts = ["A small model.", "It has learned from a large teacher."]
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.inference_mode():
    states = model(**batch).last_hidden_state  # sentences x tokens x {width}
"""
POOL = {
    "mean": """\
mask = batch["attention_mask"].unsqueeze(-1)
pooled = (states * mask).sum(1) / mask.sum(1)
""",
    "cls": "pooled = states[:, 0]\n",
}
"""How a vector is made of the states of a sentence, by the mode of sentence-transformers."""
SIMILARITIES = """\
vectors = torch.nn.functional.normalize(pooled)
print(vectors @ vectors.T)  # cosine similarities
"""
SHAPE = "print(states.shape)\n"
FILL_MASK = """\
batch = tokenizer(f"The capital of France is {tokenizer.mask_token}.", return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits  # sentences x tokens x words
print(tokenizer.decode(logits[batch["input_ids"] == tokenizer.mask_token_id].argmax(-1)))
"""
TEXTS = """\
batch = tokenizer({texts}, truncation=True, return_tensors="pt")
with torch.inference_mode():
    logits = model(**batch).logits
"""
LABEL = "print(model.config.id2label[logits.argmax(-1).item()])\n"
NUMBER = "print(logits.item())\n"
ANSWER = """\
batch = tokenizer("Who wrote the letter?", "Ada wrote the letter.", truncation=True, return_tensors="pt")
with torch.inference_mode():
    output = model(**batch)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(batch["input_ids"][0, start : end + 1]))
"""


def snippet(folder: Path, config: PretrainedConfig, head: Head, *, pairs: bool) -> str:
    """Returns Python that loads the model of the export `folder` from the current folder, and uses it. pairs: whether a
    classifier reads two texts."""
    auto = AUTO_CLASSES[head][0].__name__
    arguments = ", add_pooling_layer=False" if init_arguments(config, head) else ""
    loaded = LOAD.format(names=", ".join(sorted([auto, "AutoTokenizer"])), auto=auto, arguments=arguments)
    return loaded + _use(folder, config, head, pairs=pairs)


def _use(folder: Path, config: PretrainedConfig, head: Head, *, pairs: bool) -> str:
    if head == "mlm":
        return FILL_MASK
    if head == "span":
        return ANSWER
    if head == "classification":
        texts = '"One text.", "And another one."' if pairs else '"One text."'
        return TEXTS.format(texts=texts) + (NUMBER if config.num_labels == 1 else LABEL)
    pool = POOL.get(pooling_mode(folder))
    states = STATES.format(width=config.hidden_size)
    return states + (SHAPE if pool is None else pool + SIMILARITIES)


def pooling_mode(folder: Path) -> str:
    """Returns how sentence-transformers makes a vector of a sentence's states (mean, cls, …, or several joined by +);
    empty where the folder has no files of it."""
    if not (folder / MODULES).is_file():
        return ""
    modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    modes = []
    for module in modules:
        if module["type"].endswith(".Pooling"):
            settings = json.loads((folder / module["path"] / "config.json").read_text(encoding="utf-8"))
            modes += [settings["pooling_mode"]] if isinstance(settings.get("pooling_mode"), str) else []
            modes += [name.removeprefix("pooling_mode_") for name, value in settings.items() if value is True]
    return "+".join(mode.removesuffix("_tokens").removesuffix("_token") for mode in modes)
