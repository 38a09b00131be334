"""Each mend of a defect of transformers, tokenizers, torchmetrics or zstandard is still needed: a test fails when
upstream has mended it."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zstandard
from tiny_tokenizers import bert
from tokenizers import Tokenizer, models
from torchmetrics.functional.classification import multiclass_matthews_corrcoef
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel
from transformers.masking_utils import sdpa_mask

pytestmark = pytest.mark.thorough  # what they say changes with a new version alone


def a_mask_is_read_from_the_device(_: Path) -> bool:
    """Nothing can be read from the meta device."""
    mask = torch.ones(1, 4, dtype=torch.bool, device="meta")
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    try:
        sdpa_mask(**sizes, attention_mask=mask, allow_is_bidirectional_skip=True, device="meta")
    except RuntimeError as error:
        return "meta" in str(error)
    return False


def tiny_config(**settings: object) -> BertConfig:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertConfig(vocab_size=10, **sizes, **settings)


def relative_positions_are_ignored(_: Path) -> bool:
    names = [name for name, _ in BertModel(tiny_config(position_embedding_type="relative_key")).named_parameters()]
    return not any("distance" in name for name in names)


def pruned_heads_are_ignored(_: Path) -> bool:
    model = BertModel(tiny_config(pruned_heads={0: [1]}))
    return model.encoder.layer[0].attention.self.query.out_features == 8


def two_matrices_are_said_to_be_tied(folder: Path) -> bool:
    BertForMaskedLM(tiny_config(tie_word_embeddings=False)).save_pretrained(folder)
    model = BertForMaskedLM.from_pretrained(folder, config=tiny_config(tie_word_embeddings=True))
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model.config.tie_word_embeddings and not is_tied


def added_tokens_get_the_next_free_ids(folder: Path) -> bool:
    bert().save_pretrained(folder)
    (folder / "added_tokens.json").write_text('{"[E1]": 990}')
    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("[E1]") == len(bert())


def a_tokenizer_is_made_by_the_rules_of_its_class(folder: Path) -> bool:
    """Its own file says that letters keep their case; BERT's class says lower case unless it is told otherwise."""
    bert().save_pretrained(folder)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": None}))
    kept = json.loads(settings.read_text())
    settings.write_text(json.dumps({**kept, "do_lower_case": True, "tokenizer_class": "BertTokenizer"}))
    return AutoTokenizer.from_pretrained(folder).backend_tokenizer.normalizer is not None


def a_tokenizer_is_made_of_no_files(folder: Path) -> bool:
    BertConfig().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return len(tokenizer) == len(tokenizer.all_special_tokens)


def a_call_leaves_its_truncation(_: Path) -> bool:
    tokenizer = bert()
    tokenizer("a", truncation=True, max_length=4)
    return tokenizer.backend_tokenizer.truncation is not None


def an_unknown_part_of_a_tokenizer_has_no_class_of_error(_: Path) -> bool:
    parts = json.loads(bert().backend_tokenizer.to_str())
    try:
        Tokenizer.from_str(json.dumps({**parts, "normalizer": {"type": "New"}}))
    except Exception as error:
        return type(error) is Exception and "untagged enum" in str(error)
    return False


def a_full_disk_has_no_class_of_error(folder: Path) -> bool:
    folder.mkdir()
    file = folder / "tokenizer.json"
    file.symlink_to("/dev/full")
    try:
        bert().backend_tokenizer.save(str(file))
    except Exception as error:
        return not isinstance(error, OSError)
    return False


def unigram_takes_special_tokens_from_text(_: Path) -> bool:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), *((letter, -9.0) for letter in "</s>")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.encode_special_tokens = True
    return "</s>" in tokenizer.encode("a</s>a", add_special_tokens=False).tokens


def a_torn_zstd_file_is_taken_for_a_whole_one(_: Path) -> bool:
    torn = zstandard.compress(bytes(range(256)) * 1000)[:-9]
    try:
        zstandard.ZstdDecompressor().stream_reader(io.BytesIO(torn)).read()
    except zstandard.ZstdError:
        return False
    return True


def equal_rankings_have_no_correlation_of_1(_: Path) -> bool:
    values = torch.arange(1.0, 5.0, dtype=torch.float64)
    return float(spearman_corrcoef(values, values)) < 1 - 1e-9


def one_label_has_a_matthews_correlation(_: Path) -> bool:
    labels = torch.ones(3, dtype=torch.int64)
    return float(multiclass_matthews_corrcoef(labels, labels, num_classes=2)) != 0


def constants_have_no_correlation(_: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return math.isnan(pearson_corrcoef(torch.ones(3), torch.arange(3.0)))


MENDS: dict[Callable[[Path], bool], str] = {
    a_mask_is_read_from_the_device: "engine/models/attention.py:_without_asking_the_device",
    relative_positions_are_ignored: "engine/hub/config.py:REFUSED",
    pruned_heads_are_ignored: "engine/hub/config.py:REFUSED",
    two_matrices_are_said_to_be_tied: "engine/models/hub.py:_settle_tie",
    added_tokens_get_the_next_free_ids: "engine/hub/tokenizer.py:reading_difference",
    a_tokenizer_is_made_by_the_rules_of_its_class: "engine/hub/tokenizer.py:reading_difference",
    a_tokenizer_is_made_of_no_files: "engine/hub/tokenizer.py:load_tokenizer",
    a_call_leaves_its_truncation: "engine/data/manifest.py:tokenizer_sha256",
    an_unknown_part_of_a_tokenizer_has_no_class_of_error: "engine/hub/tokenizer.py:load_tokenizer",
    a_full_disk_has_no_class_of_error: "engine/records/run_dir.py:RunDir.write_settings",
    unigram_takes_special_tokens_from_text: "engine/data/prepare/packing.py:tokenize",
    a_torn_zstd_file_is_taken_for_a_whole_one: "engine/data/prepare/compression.py:_ZstdStream",
    equal_rankings_have_no_correlation_of_1: "engine/tasks/metrics.py:compute",
    one_label_has_a_matthews_correlation: "engine/tasks/metrics.py:_matthews",
    constants_have_no_correlation: "engine/tasks/metrics.py:_pearson",
}


@pytest.mark.parametrize("defect", MENDS, ids=lambda defect: defect.__name__)
def test_a_mend_is_still_needed(tmp_path: Path, defect: Callable[[Path], bool]) -> None:
    assert defect(tmp_path / "model"), f"upstream has mended it: remove {MENDS[defect]}"
