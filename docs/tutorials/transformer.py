# %% [markdown]
# # A transformer
#
# Attention converts like any layer: queries, keys, values and outputs each get feedback of their own, and softmax(q kᵀ) v is passed
# exactly. Here a small GPT learns the letters of Python's own documentation, for a few seconds.

# %%
import torch
from torch import nn

import falign
from falign.lab.data import load_text

text = load_text("pydoc")
print(f"{len(text.train):,} characters, {len(text.vocabulary)} of them different")


class SmallGPT(nn.Module):
    def __init__(self, characters, width=32, context=32):
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.blocks(self.characters(x) + self.positions[: x.shape[1]], mask=mask, is_causal=True)
        return self.head(self.norm(y))


# %% [markdown]
# `check` shows what each rule would do. Under a layerwise rule every matrix has a B of its shape; under a direct one the error at the
# logits is carried to every position.

# %%
characters, context = len(text.vocabulary), 32
train = text.train[: 200 * 33].reshape(-1, 33).long()
held_out = text.validation[: 40 * 33].reshape(-1, 33).long()
torch.manual_seed(0)
print(falign.check(SmallGPT(characters), "fa", example=train[:2, :-1]))


# %% [markdown]
# Training is the usual loop. `frozen` trains the last layer alone, on blocks that stay as they were drawn: what a rule has to beat.


# %%
def loss_of(model, pieces):
    return nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


for rule in ("bp", "usf", "fa", "frozen"):
    torch.manual_seed(0)
    model = falign.convert(SmallGPT(characters), rule, example=train[:2, :-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        loss_of(model, train[torch.randint(len(train), (16,))]).backward()
        optimizer.step()
    with torch.no_grad():
        print(f"{rule:7} held-out loss {loss_of(model, held_out):.3f} nats a character")

# %% [markdown]
# At this size the numbers say only that all of it runs. Measured ones, three seeds and tuned alike, are in
# [transformers and recurrent networks](../transformers.md): `usf`, `kp` and `adafa` come within 3 % of backpropagation, `fa` within 6 %.
# Fused or hand-written attention, tied heads, recurrent cells: [any architecture](../architectures.md).
