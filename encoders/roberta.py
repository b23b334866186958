"""RoBERTa (Liu et al., 2019). Notation as in adapter.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adapter import Prompt, gated_attention
from encoders.layers import Layer, check_shape, layer_outputs


@dataclass(frozen=True)
class RobertaConfig:
    """The shape of a RoBERTa; the defaults are those of roberta-base.

    Raises ValueError where the numbers make no model.
    """

    vocab_size: int = 50265  # V
    max_positions: int = 514  # two more than the tokens that it can read
    dim: int = 768  # C
    n_layers: int = 12  # N
    n_heads: int = 12  # H
    hidden_dim: int = 3072
    norm_eps: float = 1e-5
    activation: str = "gelu"
    pad_id: int = 1

    def __post_init__(self):
        check_shape(self, ("vocab_size", "max_positions", "dim", "n_layers", "n_heads", "hidden_dim"))
        if self.pad_id != 1:
            raise ValueError(f"pad_id is {self.pad_id!r}, RoBERTa's is 1")
        if self.max_length < 1:
            raise ValueError(f"{self.max_positions} positions leave none for words")

    @property
    def max_length(self) -> int:
        """So many tokens it can read: positions count from pad_id + 1."""
        return self.max_positions - self.pad_id - 1


class Roberta(nn.Module):
    """Words, with learned positions. The first is <s>; a batch is padded to the right."""

    def __init__(self, config: RobertaConfig, attention: Callable[..., Tensor] = gated_attention):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.types = nn.Embedding(1, config.dim)  # one alone, added to all: BERT's two kinds of sentence are gone
        self.embedding_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config, False, attention) for _ in range(config.n_layers))

    def forward(self, ids: Tensor, prompts: Sequence[Prompt] = ()) -> list[Tensor]:
        """What every layer puts out, N times (B, T, C), for ids (B, T). Padding is seen by none; what comes of it is
        of no account."""
        word = ids != self.config.pad_id  # (B, T)
        positions = word.cumsum(dim=1) * word + self.config.pad_id  # of words from pad_id + 1 on, of padding pad_id
        x = self.embedding_norm(self.words(ids) + self.positions(positions) + self.types.weight[0])
        return layer_outputs(self.layers, x, prompts, word[:, None, None])  # the mask broadcasts to (B, H, T, T)

    def encode(self, ids: Tensor, prompts: Sequence[Prompt] = ()) -> Tensor:
        """What heads read, (B, T, C)."""
        return self(ids, prompts)[-1]
