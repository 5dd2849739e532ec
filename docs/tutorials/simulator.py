# %% [markdown]
# # The width-free simulator
#
# A linear network f(x) = (1/√p) βᵀWx with p hidden neurons trains by feedback alignment through a fixed random b. The theory is
# about p → ∞. `WidthFree` holds inner products in place of weights, so that a thousand million neurons cost as much as two hundred.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

from falign.theory.two_layer import Penalty, WidthFree, simulate

for p in (200, 10**9):
    begun = time.perf_counter()
    runs = WidthFree.sample(range(4), n=50, d=150, p=p, rate=1e-3, penalties=[Penalty(0.0)])
    path = simulate(runs, [0, 500])
    seconds = time.perf_counter() - begun
    loss = path.values["loss"].mean(0).ravel()
    print(f"p = {p:>13,}: loss {loss[0]:.3f} to {loss[-1]:.1e}, 4 seeds")
    assert seconds < 20

# %% [markdown]
# Does the network align? The cosine between b and β after training falls as n/p: a wide network learns *without* alignment. A ridge λ
# on β, later taken away, makes it align at any width. This is the question of Song, Xu and Lafferty 2021, whose paper is
# [reproduced whole](../song2021.md).

# %%
widths = [100, 1000, 10_000, 100_000, 1_000_000]
ridges = (0.0, 3.0, 10.0)
cosines = []
for p in widths:
    runs = WidthFree.sample(range(8), n=50, d=150, p=p, rate=1e-3, penalties=[Penalty(ridge) for ridge in ridges])
    cosines.append(simulate(runs, [0, 500]).values["cosine"][..., -1].mean(0))
cosines = np.array(cosines)

figure, axes = plt.subplots(figsize=(6, 3.4))
for index, ridge in enumerate(ridges):
    axes.loglog(widths, cosines[:, index], marker="o", label=f"ridge λ = {ridge:g}")
axes.loglog(widths, [50 / p for p in widths], "k:", label="n / p")
axes.set(xlabel="hidden neurons p", ylabel="cos∠(b, β) at the end")
axes.legend(frameon=False)
figure.tight_layout()
plt.show()

# %% [markdown]
# Without a ridge the cosine lies on n/p over four orders of magnitude; with one it does not depend on the width. Kernels, theorems with
# their assumptions and the engines for other activations: [two-layer networks](../two_layer.md).
