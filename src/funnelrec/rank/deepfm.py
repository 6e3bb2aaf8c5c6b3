"""DeepFM — factorisation machine and deep network over one shared embedding table.

Paper: Guo, Tang, Ye, Li, He. DeepFM: a factorization-machine based neural network for CTR prediction. IJCAI 2017.
       arXiv:1703.04247
Idea:  low-order interactions by FM, high-order by an MLP, trained jointly, without feature engineering.

Eq. (1)  ŷ = σ(y_FM + y_DNN)                   forward (we return the logit; σ lives in the loss)
Eq. (2)  y_FM = ⟨w, x⟩ + Σ_{i<j} ⟨V_i, V_j⟩ x_i x_j   core.nn.crosses.fm_with_vectors
Eq. (3)  a⁰ = [e_1, …, e_F]                    flatten, the same e as in Eq. (2)
Eq. (4)  aˡ⁺¹ = σ(Wˡ aˡ + bˡ)                  core.nn.mlp.MLP, σ = ReLU; its last layer gives y_DNN
Differs: w_i and V_i of a value are one row of one table (one look-up a field); the MLP's last bias is the bias of the
         whole model. A field of many values is the mean of their rows, for both parts. `batch_norm` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.crosses import fm_with_vectors
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["DeepFM"]


@keeps_config
class DeepFM(nn.Module):
    """Logit of a click from FM pairs plus an MLP over the same embeddings."""

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 10,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=True)  # a row holds V_i and w_i
        in_features = self.embedding.output_fields * embedding_dim
        self.deep = MLP(in_features, (*hidden, 1), dropout=dropout, batch_norm=batch_norm)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        y_fm, e = fm_with_vectors(self.embedding.rows(batch))  # (B,), (B, F, D)   Eq. (2)
        y_dnn: Tensor = self.deep(e.flatten(1)).squeeze(1)  # (B, F·D) -> (B,)   Eq. (3)-(4)
        return y_fm + y_dnn  # (B,)   Eq. (1) before σ
