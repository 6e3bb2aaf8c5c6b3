"""MM-Rec: the user by hand, masks that hold, one encoding an item, and a task that needs both senses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.evaluate.metrics import auc
from funnelrec.learn.optim import make_optimizers
from funnelrec.rank.mm_rec import MMRec
from tests.contracts import make_spec

ITEMS = 12


def spec(items: int = ITEMS) -> Spec:
    return make_spec([("user", "user", 4, 1), ("item", "item", items, 1)])


def model(seed: int = 0, **options: object) -> MMRec:
    arguments = {
        "embedding_dim": 8,
        "num_tokens": 20,
        "title_len": 5,
        "num_regions": 3,
        "region_dim": 4,
        "num_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MMRec(spec(), **{**arguments, **options})  # type: ignore[arg-type]
        for parameter in made.parameters():
            if parameter.dim() == 1 and len(parameter) > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(seed)
    titles = torch.randint(1, 20, (ITEMS, 5), generator=generator, dtype=torch.int32)
    titles[:, 3:] = 0
    titles[5, 1:] = 0
    regions, places = torch.randn(ITEMS, 3, 4, generator=generator), torch.rand(ITEMS, 3, 5, generator=generator)
    mask = torch.ones(ITEMS, 3, dtype=torch.bool)
    mask[:, 2] = False
    mask[4] = False  # item 4 has no picture
    if made.has_pictures:
        made.set_content(titles, regions, places, mask)
    else:
        made.set_content(titles)
    return made.eval()


def batch() -> Batch:
    history = torch.tensor([[0, 2, 3, 4], [0, 0, 0, 0], [6, 7, 2, 2]])
    item = torch.tensor([5, 6, 4])
    return Batch(
        ids=torch.zeros(3, 2, dtype=torch.int32),
        item=item,
        history=history,
        mask=history > 0,
        numbers=torch.zeros(3, 0),
    )


def test_the_user_by_hand() -> None:
    """Two items of the history, D = 2, with r^v = 0: u = u^tt + the mean of the titles; the other sums vanish."""
    candidate = torch.tensor([[1.0, 0.0]])
    titles = torch.tensor([[[math.sqrt(2) * math.log(3), 0.0], [0.0, 2.0]]])
    nothing, mask = torch.zeros_like(titles), torch.tensor([[True, True]])
    u = MMRec.user((candidate, torch.zeros(1, 2)), (titles, nothing), (mask, mask))
    first, second = titles[0]
    by_hand = 0.75 * first + 0.25 * second + 0.5 * (first + second)  # e^(ln 3) to 1
    torch.testing.assert_close(u[0], by_hand)
    unknown = torch.tensor([[False, False]])
    assert not MMRec.user((candidate, candidate), (titles, titles), (unknown, unknown)).any()
    pictures = MMRec.user((candidate, torch.zeros(1, 2)), (titles, titles), (mask, unknown))
    torch.testing.assert_close(pictures[0], by_hand)  # nobody has a picture, whatever its vector says


def test_order_has_no_say() -> None:
    made, one = model(), batch()
    logits = made(one)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(made(one.replace(history=one.history[:, order], mask=one.mask[:, order])), logits)
    turned = torch.tensor([1, 0, 2])
    made.set_content(None, made.regions[:, turned], made.places[:, turned], made.region_mask[:, turned])
    torch.testing.assert_close(made(one), logits)
    made.set_content(made.titles[:, [1, 0, 2, 3, 4]])
    assert not torch.allclose(made(one), logits, atol=1e-4)  # the control: words have an order


def test_what_is_masked_has_no_say() -> None:
    made, one = model(), batch()
    logits = made(one)
    assert logits[1] == made.bias  # nothing is known of this user
    noise = torch.where(made.region_mask.unsqueeze(2), made.regions, 9.0)
    made.set_content(None, noise, region_mask=made.region_mask.clone())
    torch.testing.assert_close(made(one), logits)
    history = torch.where(one.mask, one.history, 7)
    torch.testing.assert_close(made(one.replace(history=history)), logits)
    assert not torch.allclose(made(one.replace(history=history, mask=torch.ones_like(one.mask))), logits)  # the control
    with torch.no_grad():
        made.words.table.weight[0] = 5.0  # padding
    torch.testing.assert_close(made(one), logits)


def test_together_apart_and_prepared() -> None:
    made, one = model(), batch()
    together = made(one)
    for i in range(3):
        torch.testing.assert_close(made(one.select(torch.tensor([i]))), together[i : i + 1])
    made.prepare()
    torch.testing.assert_close(made(one), together)
    with torch.no_grad():
        made.word_pool.project.bias.add_(1.0)
    torch.testing.assert_close(made(one), together)  # prepared vectors stay
    made.train()
    made.eval()
    assert not torch.allclose(made(one), together)


def test_words_may_be_columns() -> None:
    made = MMRec(spec(), embedding_dim=8, num_heads=2, dropout=0.0).eval()
    torch.nn.init.normal_(made.words.table.weight[1:])
    one = batch()
    ids = torch.stack([torch.zeros(3, dtype=torch.int64), 3 + one.item], 1).int()
    with_columns = one.replace(ids=ids, history_ids=((3 + one.history) * one.mask).unsqueeze(2).int())
    logits = made(with_columns)
    assert torch.isfinite(logits).all()
    assert not torch.allclose(made(with_columns.replace(ids=ids.flip(0), item=one.item.flip(0))), logits)


def test_bad_content() -> None:
    with pytest.raises(ValueError, match=r"titles of this model are \[12, 5\], received \[12, 6\]"):
        model().set_content(torch.zeros(ITEMS, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="both num_regions and region_dim, received 3 and 0"):
        model(region_dim=0)
    with pytest.raises(ValueError, match="name user and item in the schema"):
        MMRec(make_spec([("word", "context", 4, 1)]))


def _crossed(generator: torch.Generator, items: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Titles and pictures, each with a kind of its own: (titles, regions, kind told by the title, by the picture)."""
    order = torch.randperm(items, generator=generator)
    told, seen = order % 4, (order // 4) % 4  # every pair of kinds is equally frequent
    titles = torch.stack([1 + told, torch.randint(5, 20, (items,), generator=generator)], 1)
    regions = torch.randn(items, 2, 6, generator=generator) * 0.3
    regions[torch.arange(items), torch.randint(2, (items,), generator=generator), seen] += 2.0
    return titles.int(), regions, told, seen


@pytest.mark.parametrize(("words", "pictures"), [(True, True), (True, False), (False, True)])
def test_a_task_that_needs_both(words: bool, pictures: bool) -> None:
    """People like one kind; the history says it in titles alone, candidates show it in pictures alone."""
    generator = torch.Generator().manual_seed(0)
    titles, regions, told, seen = _crossed(generator)

    def draw(size: int, low: int, high: int) -> tuple[Batch, Tensor]:
        """One candidate that fits for one that does not; items low..high."""
        pool = torch.arange(low, high)
        taste, fits = torch.randint(4, (size,), generator=generator), torch.arange(size) % 2 == 0
        shown = torch.where(fits, taste, (taste + torch.randint(1, 4, (size,), generator=generator)) % 4)
        by_title = torch.rand(size, len(pool), generator=generator) * (told[pool] == taste[:, None])
        by_picture = torch.rand(size, len(pool), generator=generator) * (seen[pool] == shown[:, None])
        history, item = pool[by_title.topk(3, dim=1).indices], pool[by_picture.argmax(1)]
        return Batch(item=item, history=history, mask=history > 0, label=fits.float()), fits

    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"num_tokens": 20, "title_len": 2, "num_regions": 2, "region_dim": 6}
        made = MMRec(spec(400), embedding_dim=16, num_heads=2, dropout=0.0, **options)
        made.set_content(
            titles if words else torch.ones_like(titles), regions if pictures else torch.ones_like(regions)
        )
        optimizers = make_optimizers(made, lr=5e-3)
        for _ in range(300):
            part, _ = draw(128, 2, 300)
            optimizers.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(made(part), part.label).backward()
            optimizers.step()
    made.eval()
    part, fits = draw(2000, 300, 400)  # items that were never seen
    area = auc(fits.double().numpy(), made(part).detach().double().numpy())
    assert (area > 0.9) if words and pictures else (0.4 < area < 0.6), area
