"""A student with only the embeddings that occur trains like the whole one."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import tiny_model

from engine.models.compact_embedding import CompactEmbedding, keep_tokens, whole_vocabulary


def words(model: torch.nn.Module) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()


def trained(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Three steps of AdamW towards a fixed target; the last hidden state afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        (hidden - torch.linspace(-1, 1, hidden.shape[-1]) * step).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "albert", "electra", "modernbert", "mpnet", "deberta-v2"]
)
def test_training_is_that_of_the_whole_vocabulary(family: str) -> None:
    ids = torch.tensor([[5, 9, 7, 9], [30, 7, 5, 11]])
    whole, compact = tiny_model(family), tiny_model(family)
    compact.load_state_dict(whole.state_dict())
    before = words(whole).clone()
    keep_tokens(compact, torch.unique(ids))
    torch.manual_seed(0)
    want = trained(whole, ids)
    torch.manual_seed(0)
    got = trained(compact, ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    state = whole_vocabulary(compact, compact.state_dict())
    assert state.keys() == whole.state_dict().keys()
    name = next(n for n, tensor in whole.state_dict().items() if tensor.shape == before.shape)
    torch.testing.assert_close(state[name][torch.unique(ids)], words(whole)[torch.unique(ids)], rtol=1e-4, atol=1e-5)
    assert not torch.equal(state[name][5], before[5])
    assert torch.equal(state[name][40], before[40]), "what never occurred is as it was"


def test_an_unannounced_token_is_an_error_and_padding_learns_nothing() -> None:
    whole = torch.nn.Embedding(20, 4, padding_idx=3)
    compact = CompactEmbedding(whole, torch.tensor([7, 15]))
    assert compact.weight.shape == (3, 4), "padding is always there"
    ids = torch.tensor([[7, 15, 3]])
    assert torch.equal(compact(ids), whole(ids))
    compact(ids).sum().backward()
    assert compact.weight.grad is not None
    assert compact.weight.grad.sum(1).tolist() == [0.0, 4.0, 4.0]
    with pytest.raises(IndexError):
        compact(torch.tensor([[8]]))


def test_written_out_weights_keep_the_precision_they_come_in() -> None:
    whole = torch.nn.Embedding(6, 2)
    compact = CompactEmbedding(whole, torch.tensor([4, 1]))
    full = compact.whole(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    assert full.dtype == torch.float64
    assert full[1].tolist() == [1.0, 2.0]
    assert full[4].tolist() == [3.0, 4.0]
    assert torch.equal(full[0], whole.weight[0].double())
