"""Song, Xu and Lafferty 2021: convergence and alignment in two-layer networks, with and without a ridge."""

from falign.lab.experiment import Interpretation, LazyExperiments, Paper

__all__ = ["SONG2021"]

SONG2021 = Paper(
    name="song2021",
    title="Convergence and Alignment of Gradient Descent with Random Backpropagation Weights",
    authors="Ganlin Song, Ruitu Xu, John Lafferty",
    venue="NeurIPS 2021",
    address="https://arxiv.org/abs/2106.06044",
    experiments=LazyExperiments(
        {
            "song2021.figure2": "falign.papers.song2021.figure2:FIGURE2",
            "song2021.widths": "falign.papers.song2021.widths:WIDTHS",
            "song2021.time": "falign.papers.song2021.widths:TIME",
            "song2021.open": "falign.papers.song2021.figure2:OPEN",
            "song2021.dropout": "falign.papers.song2021.dropout:DROPOUT",
            "song2021.figure3": "falign.papers.song2021.figure3:FIGURE3",
            "song2021.kernels": "falign.papers.song2021.kernels:KERNELS",
            "song2021.convergence": "falign.papers.song2021.convergence:CONVERGENCE",
            "song2021.alignment": "falign.papers.song2021.alignment:ALIGNMENT",
            "song2021.inputs": "falign.papers.song2021.inputs:INPUTS",
        }
    ),
    interpretations=(
        Interpretation(
            "Sign: algorithm 1 subtracts η Σ e_i (…) although e = y - f, which ascends.",
            "Descent. The printed sign leaves the finite numbers within some dozens of steps.",
        ),
        Interpretation(
            "The ridge's update is printed with 1 - λ(t), the discussion has 1 - ηλ.",
            "β ← (1 - ηλ(t)) β + …, the gradient step on ½λ(t)|β|². Only with it do λ = Lγ and S_λ ∝ 1/η make sense.",
        ),
        Interpretation(
            "β(t) in the discussion carries η/√p before b.",
            "(η/√p)²: the printed brackets are what is left of a square; with it the identity holds to rounding.",
        ),
        Interpretation(
            "The values of λ in figure 2 stand in a legend that cannot be read.",
            "Linear 0, 1, 3, 10, 30; ReLU 0, 1, 3, 10; tanh 0, 0.03, 0.1, 0.3: from no alignment to strong alignment.",
        ),
        Interpretation(
            "The law of the synthetic inputs is not stated.",
            "x ~ N(0, I_d), with which the stated rates converge in thousands of steps. Experiment song2021.open shows "
            "N(0, I_d/d) beside it: the same rates then learn d times slower.",
        ),
        Interpretation(
            "“Until the loss function converges”: no number of steps, no rule.",
            "5000 steps for linear, 2000 for ReLU, 3000 for tanh networks. With constant λ > 0 there is no fixed point "
            "and the cosine keeps rising, see song2021.open; numbers at λ > 0 are numbers at that step.",
        ),
        Interpretation(
            "Whether the inputs, the teacher and the start are new in each of the 50 runs.",
            "All are, the teacher having the student's width. The runs of one seed share inputs and random streams "
            "across λ and, as far as sizes allow, across widths: differences are taken run by run, and standard errors "
            "are over the seeds.",
        ),
        Interpretation(
            "Figure 3: scale of the initial weights, and whether the loss is a mean.",
            "Equation 2.1 taken literally, all weights N(0, 1) and f = βᵀψ(Wx)/√p, cross-entropy averaged over the "
            "batch; N(0, 1/d) for the first layer is shown beside it.",
        ),
        Interpretation(
            "Figure 3: alignment of δ_BP and δ_FA of a k-dimensional output.",
            "The mean over all training images of cos∠(β e_i, b e_i); the flattened cos∠(β, b) is in the data too.",
        ),
        Interpretation(
            "Dropout: share, rate and activation are not stated.",
            "ReLU, half of the hidden neurons, η = 5e-4: half of figure 2's rate, as dropout doubles the second "
            "moments that bound a stable step.",
        ),
        Interpretation(
            "The theorems name constants (C1, C2, c1, c2, c_S) without values.",
            "Inequalities are tried as printed at the sizes of the grid; what the constants would have to be is "
            "measured and kept in the table. Where a value is needed, c_S is the point's.",
        ),
        Interpretation(
            "Images: the paper trains on MNIST.",
            "At the preset “paper” MNIST, its 10,000-digit part and Fashion-MNIST, those that are there; the smaller "
            "presets train on the 8 × 8 digits that scikit-learn ships.",
        ),
    ),
)
