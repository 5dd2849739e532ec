# %% [markdown]
# # FA and DFA from scratch
#
# Both rules by hand, in thirty lines, and asserted equal to what falign does. Rows are samples; a layer computes z = h Wᵀ + b.

# %%
import torch
from torch import nn

import falign

torch.manual_seed(0)
x, y = torch.randn(32, 20, dtype=torch.float64), torch.randint(5, (32,))
model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 25), nn.Tanh(), nn.Linear(25, 5)).double()


# %%
def gradients(rule, weights, biases, feedback):
    """The gradients of all weights and biases by a rule; feedback[l] carries an error to the input of layer l."""
    hidden = [x]
    for W, b in zip(weights[:-1], biases[:-1]):
        hidden.append(torch.tanh(hidden[-1] @ W.T + b))
    output = hidden[-1] @ weights[-1].T + biases[-1]
    at_output = (output.softmax(1) - nn.functional.one_hot(y, 5)) / len(y)  # of the mean cross-entropy

    result, error = [], at_output
    for layer in (2, 1, 0):
        result.append((error.T @ hidden[layer], error.sum(0)))  # local: error times input
        if layer > 0:
            if rule == "fa":  # the layer above hands its own error back, through B in place of W
                carried = error @ feedback[layer]
            else:  # dfa: the output's error comes directly, through a B of this layer's own
                carried = at_output @ feedback[layer]
            error = carried * (1 - hidden[layer] ** 2)  # the derivative of tanh
    return result[::-1]


# %% [markdown]
# `feedback_state` gives the matrices that falign has drawn, by the name of the layer.

# %%
layers = [model[0], model[2], model[4]]
weights, biases = [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]

for rule in ("fa", "dfa"):
    falign.convert(model, rule, seed=1, example=x)
    B = falign.feedback_state(model)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    by_hand = gradients(rule, weights, biases, [None, B["2"], B["4"]])
    for layer, (weight, bias) in zip(layers, by_hand):
        torch.testing.assert_close(layer.weight.grad, weight, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(layer.bias.grad, bias, rtol=1e-12, atol=1e-15)
    print(f"{rule}: equal. Shapes of B: { {name: tuple(matrix.shape) for name, matrix in B.items()} }")
    falign.revert(model)

# %% [markdown]
# B has W's shape under `fa`, and (outputs, features) under `dfa`. With B = W the first is backpropagation: the same function says so.

# %%
model.zero_grad()
nn.functional.cross_entropy(model(x), y).backward()
for layer, (weight, bias) in zip(layers, gradients("fa", weights, biases, weights)):
    torch.testing.assert_close(layer.weight.grad, weight, rtol=1e-12, atol=1e-15)
print("fa with B = W: backpropagation")

# %% [markdown]
# Convolutions, attention, residual connections: [what is delivered where](../convention.md) says the same with their shapes.
