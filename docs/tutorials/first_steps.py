# %% [markdown]
# # First steps
#
# One call turns a PyTorch model into a learner without weight transport. Loop, loss and optimizer stay yours.

# %%
import torch
from sklearn.datasets import load_digits

import falign

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loss_fn = torch.nn.functional.cross_entropy


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 100), torch.nn.Tanh(),
        torch.nn.Linear(100, 100), torch.nn.Tanh(),
        torch.nn.Linear(100, 10),
    )  # fmt: skip


# %% [markdown]
# `check` says what would happen, and changes nothing. `convert` does it.

# %%
print(falign.check(network(), "dfa", example=x))
model = falign.convert(network(), "fa", seed=0)


# %% [markdown]
# A loop as any other. The first rule in the list, `bp`, is backpropagation; the last, `frozen`, trains the last layer alone. A rule
# that teaches hidden layers has to end clearly above that. (One seed of a small network: differences of a point say nothing.)


# %%
def train(rule, epochs=12):
    model = falign.convert(network(), rule, seed=0, example=x[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(1500, generator=torch.Generator().manual_seed(0)).split(50):
            optimizer.zero_grad()
            loss_fn(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return model, float((model(x[1500:]).argmax(1) == y[1500:]).float().mean())


models = {}
for rule in ("bp", "usf", "fa", "dfa", "frozen"):
    models[rule], accuracy = train(rule)
    print(f"{rule:7} test accuracy {accuracy:.1%}")

# %% [markdown]
# How near are the gradients that `fa` took to the true ones? 90° would be chance.

# %%
print(falign.measure.alignment(models["fa"], loss_fn, x[:200], y[:200]))

# %% [markdown]
# And is it really this rule, or backpropagation by a side door? `verify` computes the batch's gradients from the rule's written-out
# definition, another way, and lists parameters that carried an error: none may.

# %%
print(falign.verify(models["fa"], x[:50], lambda output: loss_fn(output, y[:50])))

# %% [markdown]
# `falign.backprop(model)` is the true gradient on the same weights, and `revert` gives the plain network back. Next:
# [what alignment is](alignment.py), and [every rule in one table](../rules.md).

# %%
print(type(falign.revert(models["fa"])[0]), list(models["fa"].state_dict())[:2])
