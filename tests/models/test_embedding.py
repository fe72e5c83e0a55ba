"""Embeddings: what they are by hand, whatever stands beside them, read once, kept whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_embedding import encoder
from tiny_models import batch, ragged, tiny
from tokenmdp.models import embedding, fetch
from tokenmdp.models.embedding import Embedder, Encoder, OwnBody
from tokenmdp.models.embedding_cache import embedded
from tokenmdp.types import Batch


@pytest.fixture(params=["own mean row", "own last row", "own first response", "own mean response", "encoder"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    kind, *rest = request.param.split()
    return encoder() if kind == "encoder" else OwnBody(tiny("llama").freeze(), *rest)


def by_hand(own: OwnBody, b: Batch, row: int) -> Tensor:
    """One row alone, without padding."""
    length = int(b.length[row])
    states = own.policy.backbone.hidden(b.tokens[row : row + 1, :length])[0]
    counting = states if own.over == "row" else states[b.action[row, :length]]
    return {"mean": counting.mean(0), "last": counting[-1], "first": counting[0]}[own.pool]


def test_it_is_the_pooled_state_of_each_row(embedder: Embedder):
    b = ragged()
    found = embedded(embedder, b, tokens=30)
    assert found.shape == (len(b), embedder.width)
    assert found.dtype == torch.float32
    if isinstance(embedder, OwnBody):
        wanted = torch.stack([by_hand(embedder, b, row) for row in range(len(b))])
        torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(b)))


def test_neighbours_and_padding_change_nothing(embedder: Embedder):
    b = ragged()
    whole = embedded(embedder, b)
    alone = torch.cat([embedded(embedder, b.select([row])) for row in range(len(b))])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


def test_an_empty_response_is_embedded_as_zeros_and_an_empty_row_of_text_too():
    own = OwnBody(tiny("llama").freeze(), "mean", "response")
    found = embedded(own, batch([([3, 4], []), ([3, 4], [5])]))
    assert not found[0].any()
    assert bool(found[1].any())
    for pool in embedding.POOLS:
        assert not embedded(encoder(pool=pool), ["", "w3"])[0].any()  # its tokenizer adds nothing to nothing


def test_the_response_alone_or_with_its_prompt():
    b = batch([([3, 4], [5, 6]), ([7, 8], [5, 6])])
    told, seen = embedded(encoder(over="response"), b), embedded(encoder(over="row"), b)
    assert torch.equal(told[0], told[1])
    assert not torch.allclose(seen[0], seen[1])


def test_a_text_that_is_too_long_loses_its_beginning():
    short = encoder(max_tokens=3)
    assert [piece.ids for piece in short.pieces(["w9 w1 w2 w3", "w2 w3"])] == [(1, 2, 3), (2, 3)]
    own = OwnBody(tiny("llama").freeze())
    [piece] = own.pieces([" ".join(["w9"] * 5 + ["w1"] * own.policy.context)])
    assert piece.ids == (1,) * own.policy.context


def test_the_fingerprint_is_of_all_that_the_numbers_depend_on():
    prints = [OwnBody(tiny("llama").freeze(), pool).fingerprint() for pool in embedding.POOLS]
    prints += [OwnBody(tiny("llama", seed=1).freeze()).fingerprint()]
    prints += [encoder(**k).fingerprint() for k in ({}, {"normalise": False}, {"max_tokens": 5}, {"seed": 1})]
    assert len(set(prints)) == len(prints)
    assert OwnBody(tiny("llama").freeze()).fingerprint() == prints[0]


def saved(folder: Path) -> Path:
    made = encoder()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_from_a_folder(tmp_path: Path):
    texts = ["w3 w4", "w5"]
    loaded = embedding.load(str(saved(tmp_path)), tiny("llama"))
    assert isinstance(loaded, Encoder)
    torch.testing.assert_close(embedded(loaded, texts), embedded(encoder(), texts))
    types = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    (tmp_path / "modules.json").write_text(json.dumps([{"type": name} for name in types]))
    plain = embedding.encoder(str(tmp_path))
    torch.testing.assert_close(embedded(plain, texts), embedded(encoder(normalise=False), texts))
    assert embedding.encoder(str(tmp_path)).fingerprint() == plain.fingerprint(), "nothing of it is random"
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ValueError, match="computes Dense after its states"):
        embedding.encoder(str(tmp_path))


def test_an_encoder_whose_weights_are_not_all_there(tmp_path: Path):
    weights = load_file(saved(tmp_path) / "model.safetensors")
    gone = next(name for name in weights if "layer.1" in name)
    save_file(
        {name: x for name, x in weights.items() if name != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lack encoder.layer.1.* they would be random numbers"):
        embedding.encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "own", "pool": "max"}, "pool is 'max'; it must be one of mean, last, first"),
        ({"kind": "own", "over": "prompt"}, "over is 'prompt'; it must be one of row, response"),
        ({"kind": "./nothing-here"}, "no encoder could be loaded from './nothing-here'"),
    ],
)
def test_what_does_not_exist(wrong: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        embedding.load(policy=tiny("llama"), **wrong)


@pytest.mark.skipif(
    not (fetch.is_cached(embedding.MINILM) and fetch.is_cached(embedding.MINILM_TOKENIZER)),
    reason="the packaged encoder has not been fetched on this machine",
)
def test_the_packaged_encoder_knows_what_texts_mean():
    texts: Sequence[str] = ["A wonderful film.", "A movie I loved.", "The invoice is due on Monday."]
    found = embedded(embedding.minilm(), texts)
    assert found.shape == (3, 384)
    near = found @ found.T
    assert float(near[0, 1]) > 0.5 > float(near[0, 2])
