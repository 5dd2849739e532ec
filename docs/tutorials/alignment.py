# %% [markdown]
# # What alignment is
#
# Feedback alignment sends the error back through fixed random weights B. It learns because the forward weights W turn until B is
# nearly as good as their transpose. Here the turning is watched, and the law behind it checked.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import falign

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loss_fn = torch.nn.functional.cross_entropy

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 100), torch.nn.ReLU(),
    torch.nn.Linear(100, 100), torch.nn.ReLU(),
    torch.nn.Linear(100, 10),
)  # fmt: skip
model = falign.convert(model, "fa", seed=0)

# %% [markdown]
# A monitor measures inside any loop and leaves no trace in it; a conservation law is followed along the same steps.

# %%
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
law = falign.measure.ConservationLaw(model, optimizer)
with falign.measure.Monitor(model, every=20, optimizer=optimizer) as monitor:
    for _ in range(10):
        for batch in torch.randperm(1500).split(50):
            monitor.step(loss_fn, x[batch], y[batch])
            optimizer.zero_grad()
            loss_fn(model(x[batch]), y[batch]).backward()
            optimizer.step()
rows = monitor.to_polars()

# %% [markdown]
# On the left the angle between the gradient that a layer takes and the true one, on the right that between B and W. The last layer
# always has its true gradient. Those below begin at 90°, which is chance, and come down: first W in front of the output turns
# towards its B, and the layers below follow.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3), sharey=True)
for layer in ("0", "2", "4"):
    of_layer = rows.filter(rows["layer"] == layer)
    left.plot(of_layer["step"], of_layer["gradient_angle"], label=f"layer {layer}")
    if layer != "0":  # whose feedback carries nothing
        right.plot(of_layer["step"], of_layer["weight_angle"], label=f"layer {layer}")
left.set(xlabel="step", ylabel="degrees", title="gradient taken to true gradient")
right.set(xlabel="step", title="B to W")
for axes in (left, right):
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Why does W turn? Under gradient flow, of every hidden neuron ½|w|² + ½b² − ⟨B, W⟩ stays what it was: w are its incoming weights,
# and ⟨B, W⟩ is how well its outgoing ones agree with its feedback. So whatever makes the incoming weights grow makes the neuron
# align, whatever the data and the loss. Steps of finite size add a drift that is known exactly, and is accounted for.

# %%
print(law.report())

# %% [markdown]
# How each column is read, and how it misleads: [seeing why it learns](../measuring.md). An angle alone is no evidence that hidden
# layers were taught anything: run `frozen` and `shallow` beside it.
