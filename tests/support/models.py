"""Small models with random weights: a block MLP for most tests, and one of each transformer family.

transformers is imported late, so that tests which do not need it run without it.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block with what weight decay and block finding must tell apart: matrices, biases, a normalisation."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class BlockMLP(nn.Module):
    """Embedding, `depth` blocks, final normalisation, head; with many outputs the head is larger than a block."""

    def __init__(self, depth: int = 4, width: int = 6, outputs: int = 3):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def block_mlp(
    depth: int = 4, width: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0, outputs: int = 3
) -> BlockMLP:
    """A BlockMLP whose weights are the same for the same seed; normalisation weights are random, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlockMLP(depth, width, outputs)
        for p in model.parameters():
            p.data.normal_(std=0.5)
    return model.to(dtype)


def grown(model: BlockMLP) -> nn.Module:
    """With two layers more, one of them first in alphabetical order."""
    model.aaa, model.extra = nn.Linear(3, 3), nn.Linear(3, 2)
    return model


def real_loss(model: nn.Module, data: int) -> Tensor:
    """Of a block MLP on random examples."""
    generator = torch.Generator().manual_seed(data)
    x, y = torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


class Experts(nn.Module):
    """`depth` blocks, each of which holds a list of experts that look like blocks themselves."""

    def __init__(self, depth: int = 3, experts: int = 4, width: int = 6):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(Block(width) for _ in range(experts))}) for _ in range(depth)
        )


class Holder(nn.Module):
    """Parameters of given names and values and nothing else."""

    def __init__(self, **parameters: Tensor):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


def opt(layers: int = 3) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=32,
            hidden_size=8,
            word_embed_proj_dim=8,
            ffn_dim=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


def llama(layers: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )


def gpt2(layers: int = 3) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=1)
    )


def bert(layers: int = 3) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


def t5(layers: int = 3) -> nn.Module:
    """`layers` blocks in the encoder and as many in the decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=layers, num_heads=2, decoder_start_token_id=0)
    )


def mixtral(layers: int = 3) -> nn.Module:
    """Blocks of experts, which are three-dimensional parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            max_position_embeddings=16,
        )
    )


def mamba(layers: int = 3) -> nn.Module:
    """A state space model, whose blocks read their convolution's weights without calling it."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=8, state_size=4, time_step_rank=2, num_hidden_layers=layers)
    )


# Each family -> its builder and the number of transformer blocks a layer of its configuration stands for.
FAMILIES = {
    "OPT": (opt, 1),
    "Llama": (llama, 1),
    "GPT-2": (gpt2, 1),
    "BERT": (bert, 1),
    "T5": (t5, 2),
    "Mixtral": (mixtral, 1),
    "Mamba": (mamba, 1),
}


def family_loss(family: str, model: nn.Module) -> Tensor:
    """The model's own loss on a few fixed tokens."""
    tokens = torch.arange(2, 18).view(2, 8)
    labels = torch.tensor([0, 1]) if family == "BERT" else tokens
    return model(input_ids=tokens, labels=labels).loss


def four_dimensional(family: str, mask: Tensor) -> dict[str, Tensor]:
    """As docs/backends.md says: what a closure makes of a mask (examples, tokens), whatever is in it, so that it can be
    captured.
    """
    wide, n = mask[:, None, None, :].bool(), mask.shape[1]
    if family == "BERT":
        return {"attention_mask": wide}
    made = {"attention_mask": wide & torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()}
    return {**made, "position_ids": (mask.cumsum(1) * mask - 1).long()} if family == "OPT" else made


def captures_without_mask() -> bool:
    """Whether a model of transformers that is given no mask does the same when it is captured."""
    return tuple(map(int, version("transformers").split(".")[:2])) >= (5, 18)
