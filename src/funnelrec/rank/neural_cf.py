"""NeuralCF — a learned function of a user vector and an item vector: GMF, MLP, and both fused (NeuMF).

Paper: He, Liao, Zhang, Nie, Hu, Chua. Neural Collaborative Filtering. WWW 2017. arXiv:1708.05031
Idea:  matrix factorisation scores a pair by a fixed dot product. Learn the function instead: a weighted product of the
       two vectors (GMF), a network over both (MLP), or the two side by side with vectors of their own (NeuMF).

         p_u = Pᵀ v_u, q_i = Qᵀ v_i, v one-hot or many-hot             _towers: the sum of the side's vectors
Eq. (9)  GMF: logit = hᵀ (p ∘ q) + b                                   forward
Eq. (10) MLP: z = [p, q] -> ReLU layers -> z_L, logit = hᵀ z_L + b     forward
Eq. (12) NeuMF: logit = hᵀ [p_G ∘ q_G, z_L] + b                        forward
Sec. 3.4.1  pre-training: h ← [α h_GMF, (1 − α) h_MLP], b likewise     NeuralCF.pretrained
Differs: besides the ids, all fields of a side are part of v, and the context belongs to the user's; with nothing but
         ids it is the paper's model. Numbers enter as value times vector. The widths of the MLP follow from
         `embedding_dim` k and `num_layers` L: 2^(L-1) k for each of p and q, halved by each layer down to k.
         A tuned dot product does at least as well (Rendle et al. 2020, arXiv:2005.09683).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["NeuralCF"]


@keeps_config
class NeuralCF(nn.Module):
    """Logit of a click from what the user and the item are.

    `embedding_dim` is k, the number of predictive factors; `variant` "neumf", "gmf" or "mlp".
    """

    needs_items = True

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 8,
        variant: str = "neumf",
        num_layers: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if variant not in ("neumf", "gmf", "mlp"):
            raise ValueError(f"variant is 'neumf', 'gmf' or 'mlp', received {variant!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers is at least 1, received {num_layers}")
        sides = [c.side for c in spec.categories] + [n.side for n in spec.numbers for _ in range(n.start, n.stop)]
        if "item" not in sides or len(set(sides)) < 2:
            raise ValueError(
                "NeuralCF pairs a user with an item, but this spec does not name both; "
                "name user and item in the schema, or use rank/deepfm for a table of rows"
            )
        self.register_buffer("of_item", torch.tensor([side == "item" for side in sides]), persistent=False)
        self.of_item: Tensor
        tower = embedding_dim * 2 ** (num_layers - 1)  # width of p and of q in the MLP
        self.widths = [0 if variant == "mlp" else embedding_dim, 0 if variant == "gmf" else tower]
        self.embedding = FieldEmbedding(spec, sum(self.widths))  # a row holds the vectors of GMF and of MLP
        sizes = [embedding_dim * 2**n for n in reversed(range(num_layers))]
        self.deep = None if variant == "gmf" else MLP(2 * tower, sizes, dropout=dropout, activate_last=True)
        self.head = MLP(self.widths[0] + (0 if variant == "gmf" else embedding_dim), (1,))  # h, b

    @classmethod
    def pretrained(cls, gmf: NeuralCF, mlp: NeuralCF, *, alpha: float = 0.5) -> NeuralCF:
        """NeuMF that starts where the two trained models stand: its logit is α · GMF + (1 − α) · MLP.

        Raises ValueError when they are not a "gmf" and an "mlp" of one spec and one `embedding_dim`.
        """
        configs: list[dict[str, Any]] = [vars(model)["config"] for model in (gmf, mlp)]
        kinds, factors = ([config[name] for config in configs] for name in ("variant", "embedding_dim"))
        if kinds != ["gmf", "mlp"] or factors[0] != factors[1] or gmf.embedding.spec != mlp.embedding.spec:
            raise ValueError(
                "pre-training joins a 'gmf' and an 'mlp' of one spec and embedding_dim, "
                f"received {kinds[0]!r} and {kinds[1]!r} of {factors[0]} and {factors[1]}"
            )
        fused = cls(mlp.embedding.spec, **{**configs[1], "variant": "neumf"})
        assert fused.deep is not None
        assert mlp.deep is not None
        with torch.no_grad():
            fused.deep.load_state_dict(mlp.deep.state_dict())
            both, apart = dict(fused.embedding.named_parameters()), (gmf.embedding, mlp.embedding)
            for name, weight in both.items():
                weight.copy_(torch.cat([part.get_parameter(name) for part in apart], dim=1))
            heads = [fused.head.layers[0], gmf.head.layers[0], mlp.head.layers[0]]
            h, h_gmf, h_mlp = (layer.get_parameter("weight") for layer in heads)
            h.copy_(torch.cat((alpha * h_gmf, (1 - alpha) * h_mlp), dim=1))
            b, b_gmf, b_mlp = (layer.get_parameter("bias") for layer in heads)
            b.copy_(alpha * b_gmf + (1 - alpha) * b_mlp)
        return fused

    def _towers(self, batch: Batch) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
        """p and q: the sums of the vectors of the user's (and the context's) fields, and of the item's."""
        e = self.embedding(batch)  # (B, F, E)
        return e[:, ~self.of_item].sum(1), e[:, self.of_item].sum(1)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        (p_gmf, p_mlp), (q_gmf, q_mlp) = (torch.split(side, self.widths, dim=1) for side in self._towers(batch))
        factors = [p_gmf * q_gmf]  # (B, k), or (B, 0) without GMF
        if self.deep is not None:
            factors.append(self.deep(torch.cat((p_mlp, q_mlp), dim=1)))  # (B, k)
        logit: Tensor = self.head(torch.cat(factors, dim=1)).squeeze(1)  # (B,)
        return logit
