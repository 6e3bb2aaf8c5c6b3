"""Text encoders on disk, and the vectors they give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from funnelrec.encode.text.average import WordAverage
from funnelrec.encode.text.language_model import LanguageModel
from funnelrec.encode.text.rnn import TextRNN
from funnelrec.encode.text.saved import encode_texts, encoder_version, load_encoder, save_encoder
from funnelrec.encode.text.textcnn import TextCNN
from funnelrec.encode.text.tokens import Tokens

TEXTS = ["the red fox", "", "a fox and the dog and the cat", "dog", "the red fox"]
TOKENS = Tokens.learn(TEXTS)
NETWORKS = {
    "average": lambda: WordAverage(num_tokens=len(TOKENS), embedding_dim=6),
    "rnn": lambda: TextRNN(num_tokens=len(TOKENS), hidden_dim=5, merge="sum", residual=True, num_layers=2),
    "cnn": lambda: TextCNN(num_tokens=len(TOKENS), widths=(1, 2), num_filters=3),
    "lm": lambda: LanguageModel(num_tokens=len(TOKENS), embedding_dim=6, hidden_dim=7),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_encoder_is_the_same_encoder(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    again, tokens = load_encoder(save_encoder(tmp_path / "reader", network, TOKENS))
    assert type(again) is type(network) and not again.training
    assert encoder_version(again, tokens) == encoder_version(network, TOKENS)
    vectors = encode_texts(again, tokens, TEXTS)
    torch.testing.assert_close(vectors, encode_texts(network, TOKENS, TEXTS))
    assert vectors.shape == (5, network.num_features)
    assert not vectors[1].any() and torch.equal(vectors[0], vectors[4])


def test_the_batch_and_the_order_change_nothing() -> None:
    network = NETWORKS["rnn"]()
    network.train()
    whole = encode_texts(network, TOKENS, TEXTS)
    torch.testing.assert_close(encode_texts(network, TOKENS, TEXTS, batch_size=2), whole)
    assert network.training
    torch.testing.assert_close(encode_texts(network, TOKENS, [TEXTS[2]])[0], whole[2])
    first = encode_texts(network, TOKENS, ["the red fox"], max_len=2)
    torch.testing.assert_close(first, encode_texts(network, TOKENS, ["the red"]))
    assert encode_texts(network, TOKENS, []).shape == (0, network.num_features)


def test_vectors_are_kept_until_a_weight_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, read = NETWORKS["cnn"](), []
    real = type(network).encode
    monkeypatch.setattr(type(network), "encode", lambda self, rows: read.append(len(rows)) or real(self, rows))
    first = encode_texts(network, TOKENS, TEXTS, cache=tmp_path)
    assert sum(read) == 4, "four texts differ"
    assert torch.equal(encode_texts(network, TOKENS, TEXTS, cache=tmp_path), first)
    assert sum(read) == 4
    encode_texts(network, TOKENS, [*TEXTS, "a new one"], cache=tmp_path)
    assert sum(read) == 5
    with torch.no_grad():
        network.table.weight[3, 0] += 1
    assert not torch.equal(encode_texts(network, TOKENS, TEXTS, cache=tmp_path), first)
    assert sum(read) == 9
    encode_texts(network, TOKENS, TEXTS, cache=tmp_path, max_len=1)
    assert sum(read) == 13, "how much is read is part of the version"


def test_damage_is_noticed(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "reader", NETWORKS["average"](), TOKENS)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors was changed after it was written; save it again"):
        load_encoder(folder)
    with pytest.raises(ValueError, match="holds no text encoder"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="Linear is no text encoder"):
        save_encoder(tmp_path, nn.Linear(2, 2), TOKENS)
