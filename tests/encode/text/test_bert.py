from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.encode.text.bert import Bert
from funnelrec.encode.text.classifier import TextClassifier
from funnelrec.encode.text.masking import CLS, FIRST_WORD, MASK, SEP, hide_tokens
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy
from funnelrec.learn.text import MaskedPairsLoss, NextToken, token_scores

ROWS = 40


def small(**changed: Any) -> Bert:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_dim": 32, "num_layers": 2, "num_heads": 2, "ff_dim": 64, "dropout": 0.0}
    return Bert(**{"num_tokens": ROWS, **sizes, "max_len": 32, **changed})


def text(rows: int = 4, length: int = 10, seed: int = 1) -> Tensor:
    found = torch.randint(FIRST_WORD, ROWS, (rows, length), generator=torch.Generator().manual_seed(seed))
    found[:, 0], found[:, -1] = CLS, SEP
    return found


def hidden_batch() -> Batch:
    read, hidden = hide_tokens(text(), ROWS, torch.Generator().manual_seed(2))
    return Batch(text=read, hidden=hidden)


def test_the_size_of_the_published_base_model() -> None:
    with torch.device("meta"):
        model = Bert(num_tokens=30_522)
    count = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_masks = sum(n for name, n in count.items() if name.startswith(("transform", "word_bias")))
    assert sum(count.values()) - of_masks == 109_482_240  # as published, pooler included
    assert of_masks == 768 * 768 + 768 + 2 * 768 + 30_522  # the table itself is that of the words


def test_an_untrained_one_guesses() -> None:
    model = small(next_sentence=True)
    batch = hidden_batch()
    assert float(NextToken()(model, batch).detach()) == pytest.approx(math.log(ROWS), rel=0.05)
    pairs = batch.replace(segment=torch.zeros_like(batch.text), follows=torch.tensor([0, 1, 0, 1]))
    assert float(MaskedPairsLoss()(model, pairs).detach()) == pytest.approx(math.log(ROWS) + math.log(2), rel=0.05)


def test_the_table_that_reads_is_the_table_that_guesses() -> None:
    model = small()
    states = torch.randn(3, 32)
    expected = states @ model.words.weight.T + model.word_bias
    assert torch.allclose(model.logits(states), expected, atol=1e-6)
    model.logits(states).sum().backward()
    assert model.words.weight.grad is not None


def test_only_hidden_places_are_scored() -> None:
    """The loss has no gradient at other places of the last layer; scored everywhere it has."""
    model, batch = small(), hidden_batch()
    states = model.states(batch.text).detach().requires_grad_()
    model.states = lambda content, segment=None: states  # type: ignore[method-assign]
    NextToken()(model, batch).backward()
    assert states.grad is not None
    touched = states.grad.abs().sum(2) > 0
    assert torch.equal(touched, batch.hidden != 0)
    states.grad = None
    NextToken()(model, batch.replace(hidden=batch.text)).backward()  # the control
    assert bool((states.grad.abs().sum(2) > 0).all())


def test_padding_changes_nothing() -> None:
    model, content = small(num_classes=3).eval(), text()
    longer = torch.nn.functional.pad(content, (0, 4))
    with torch.no_grad():
        assert torch.allclose(model.states(content), model.states(longer)[:, :-4], atol=1e-5)
        assert torch.allclose(model.encode(content), model.encode(longer), atol=1e-5)
        assert torch.allclose(model(content), model(longer), atol=1e-5)
        nothing = torch.zeros(2, 3, dtype=torch.int64)
        assert torch.equal(model.encode(nothing), torch.zeros(2, 32))


def test_without_positions_the_order_is_not_seen() -> None:
    model, content, order = small().eval(), text(), torch.randperm(10)
    with torch.no_grad():
        assert not torch.allclose(model.states(content)[:, order], model.states(content[:, order]), atol=1e-3)
        model.positions.weight.zero_()
        assert torch.allclose(model.states(content)[:, order], model.states(content[:, order]), atol=1e-5)


def test_segments_are_seen() -> None:
    model, content = small().eval(), text()
    with torch.no_grad():
        zero, one = (model.states(content, torch.full_like(content, s)) for s in (0, 1))
        assert torch.equal(zero, model.states(content))
        assert not torch.allclose(zero, one, atol=1e-3)


def test_pooling_by_hand() -> None:
    states = torch.tensor([[[0.2], [0.4], [9.0]]])
    content = torch.tensor([[CLS, 7, 0]])
    for pooling, expected in (("first", 0.2), ("mean", 0.3)):
        model = small(embedding_dim=1, num_heads=1, pooling=pooling)
        torch.nn.init.ones_(model.pooler.weight)
        assert model.pooled(states, content).item() == pytest.approx(math.tanh(expected))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="received 'last'"):
        small(pooling="last")
    with pytest.raises(ValueError, match="num_classes above 0"):
        small()(text())
    with pytest.raises(ValueError, match="next_sentence=True"):
        small().both_states(hidden_batch())
    with pytest.raises(ValueError, match="a text of 40 tokens exceeds max_len=32"):
        small().states(text(length=40))


class Sums:
    """Texts in which each word is followed by the next number, so a hidden word can be told from its neighbours."""

    def __len__(self) -> int:
        return 2000

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        words = FIRST_WORD + (index.unsqueeze(1) * 7 + torch.arange(10)) % (ROWS - FIRST_WORD)
        content = torch.nn.functional.pad(words, (1, 1))
        content[:, 0], content[:, -1] = CLS, SEP
        read, hidden = hide_tokens(content, ROWS, generator)
        return Batch(text=read, hidden=hidden, label=(index % 2))


def test_it_learns_what_its_neighbours_tell() -> None:
    model = small()
    batches = Batches(Sums(), 100, shuffle=True)
    before = token_scores(model, batches.epoch(9))["accuracy"]
    fit(model, batches, NextToken(), epochs=8, lr=3e-3, progress=False)
    assert before < 0.1
    assert token_scores(model, batches.epoch(9))["accuracy"] > 0.9


def test_it_learns_classes() -> None:
    class Words(Sums):
        """The class is whether word 7 occurs."""

        def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
            content = text(len(index), seed=int(index[0]))
            return Batch(text=content, label=(content == 7).any(1).long())

    model = TextClassifier(small(num_classes=2, pooling="mean"))
    batches = Batches(Words(), 100, shuffle=True)
    fit(model, batches, CrossEntropy(), epochs=5, lr=3e-3, progress=False)
    batch = next(batches.epoch(7))
    with torch.no_grad():
        assert float((model(batch).argmax(1) == batch.label).double().mean()) > 0.95


# ------------------------------------------------------------------------------------------------- published weights
def published(layers: int, dim: int, ff: int, rows: int, positions: int, prefix: str = "bert.") -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of a published checkpoint with both heads."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.word_embeddings.weight": (rows, dim),
        f"{prefix}embeddings.position_embeddings.weight": (positions, dim),
        f"{prefix}embeddings.token_type_embeddings.weight": (2, dim),
        f"{prefix}pooler.dense.weight": (dim, dim),
        f"{prefix}pooler.dense.bias": (dim,),
        "cls.predictions.transform.dense.weight": (dim, dim),
        "cls.predictions.transform.dense.bias": (dim,),
        "cls.predictions.bias": (rows,),
        "cls.seq_relationship.weight": (2, dim),
        "cls.seq_relationship.bias": (2,),
    }
    norms = [f"{prefix}embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for layer in range(layers):
        at = f"{prefix}encoder.layer.{layer}."
        for name, out, into in (
            ("attention.self.query", dim, dim), ("attention.self.key", dim, dim), ("attention.self.value", dim, dim),
            ("attention.output.dense", dim, dim), ("intermediate.dense", ff, dim), ("output.dense", dim, ff),
        ):  # fmt: skip
            shapes |= {f"{at}{name}.weight": (out, into), f"{at}{name}.bias": (out,)}
        norms += [f"{at}attention.output.LayerNorm", f"{at}output.LayerNorm"]
    shapes |= {f"{norm}.{part}": (dim,) for norm in norms for part in ("gamma", "beta")}
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def by_the_book(weights: dict[str, Tensor], content: Tensor, heads: int, layers: int) -> Tensor:
    """The last layer, written out from the paper with torch's functions."""
    norm = torch.nn.functional.layer_norm

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"bert.{name}.weight"].T + weights[f"bert.{name}.bias"]

    def normed(x: Tensor, name: str) -> Tensor:
        return norm(x, x.shape[-1:], weights[f"bert.{name}.gamma"], weights[f"bert.{name}.beta"], 1e-12)

    at = "bert.embeddings."
    x = weights[f"{at}word_embeddings.weight"][content] + weights[f"{at}token_type_embeddings.weight"][0]
    x = normed(x + weights[f"{at}position_embeddings.weight"][: content.shape[1]], "embeddings.LayerNorm")
    for layer in range(layers):
        at = f"encoder.layer.{layer}."
        q, k, v = (
            linear(x, f"{at}attention.self.{part}").unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        found = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(3) @ v
        x = normed(
            x + linear(found.transpose(1, 2).flatten(2), f"{at}attention.output.dense"),
            f"{at}attention.output.LayerNorm",
        )
        inner = torch.nn.functional.gelu(linear(x, f"{at}intermediate.dense"))
        x = normed(x + linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")
    return x


def test_published_weights_give_the_published_function(tmp_path: Path) -> None:
    weights = published(2, 32, 64, ROWS, 32)
    weights["bert.embeddings.position_ids"] = torch.arange(32).unsqueeze(0)  # older files hold it; it says nothing
    save_file(weights, tmp_path / "model.safetensors")
    model = small(next_sentence=True, num_classes=2).eval()
    assert model.load_public(tmp_path) == ["out.weight", "out.bias"]
    with torch.no_grad():
        assert torch.allclose(model.states(text()), by_the_book(weights, text(), 2, 2), atol=1e-5)
        assert torch.equal(model.next.weight, weights["cls.seq_relationship.weight"])  # type: ignore[union-attr]
        assert torch.equal(model.word_bias, weights["cls.predictions.bias"])
        # the control: queries and keys exchanged
        model.blocks[0].attention.query.weight.copy_(weights["bert.encoder.layer.0.attention.self.key.weight"])
        assert not torch.allclose(model.states(text()), by_the_book(weights, text(), 2, 2), atol=1e-5)


def test_a_body_without_heads_leaves_them_new(tmp_path: Path) -> None:
    """As a file of the body alone: no "bert." before the names, newer names of the norms, no heads."""
    newer = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for name, tensor in published(2, 32, 64, ROWS, 32, prefix="").items()
        if not name.startswith("cls.")
    }
    save_file(newer, tmp_path / "model.safetensors")
    kept = small(next_sentence=True).load_public(tmp_path)
    assert {name.partition(".")[0] for name in kept} == {"transform", "transform_norm", "word_bias", "next"}


def test_the_true_shapes_of_the_base_model() -> None:
    """The names of the published base model lead to every parameter here, each in its shape."""
    from funnelrec.encode.text.bert import _own_name

    with torch.device("meta"):
        model = Bert(num_tokens=30_522, next_sentence=True)
    sizes = published(12, 2, 3, 4, 5)  # small numbers; their shapes are translated below
    true = {2: 768, 3: 3072, 4: 30_522, 5: 512}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in sizes.items():
        expected = tuple(true[n] for n in tensor.shape)
        if name.endswith(("token_type_embeddings.weight", "seq_relationship.weight")):
            expected = (2, 768)
        elif name.endswith("seq_relationship.bias"):
            expected = (2,)
        assert own.pop(_own_name(name)) == expected, name
    assert own == {}


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no safetensors file"):
        small().load_public(tmp_path)
    save_file(published(1, 32, 64, ROWS, 32), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.query\.weight is missing"):
        small().load_public(tmp_path)
    save_file(published(2, 32, 64, ROWS, 16), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"positions\.weight has the shape \[16, 32\], not \[32, 32\]"):
        small().load_public(tmp_path)


assert MASK == FIRST_WORD - 1
