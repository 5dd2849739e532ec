"""Girotti, Mitliagkas and Gidel 2021: how fast feedback alignment learns a deep linear network, and in which order."""

from falign.lab.experiment import Interpretation, LazyExperiments, Paper

__all__ = ["GIROTTI2021"]

GIROTTI2021 = Paper(
    name="girotti2021",
    title="Convergence Analysis and Implicit Regularization of Feedback Alignment for Deep Linear Networks",
    authors="Manuela Girotti, Ioannis Mitliagkas, Gauthier Gidel",
    venue="arXiv 2110.10815, 2021",
    address="https://arxiv.org/abs/2110.10815",
    experiments=LazyExperiments(
        {
            "girotti2021.order": "falign.papers.girotti2021.order:ORDER",
            "girotti2021.learning-time": "falign.papers.girotti2021.learning_time:LEARNING_TIME",
            "girotti2021.anti-regularisation": "falign.papers.girotti2021.anti_regularisation:ANTI_REGULARISATION",
            "girotti2021.portrait": "falign.papers.girotti2021.portrait:PORTRAIT",
            "girotti2021.convergence": "falign.papers.girotti2021.convergence:CONVERGENCE",
            "girotti2021.steps": "falign.papers.girotti2021.steps:STEPS",
            "girotti2021.networks": "falign.papers.girotti2021.networks:NETWORKS",
            "girotti2021.chart": "falign.papers.girotti2021.chart:CHART",
            "girotti2021.prediction": "falign.papers.girotti2021.prediction:PREDICTION",
        }
    ),
    interpretations=(
        Interpretation(
            "Only the abstract could be read: no theorem, constant, initialisation or figure.",
            "Every claim says whether it is the abstract's or derived here. What is derived is true of the same "
            "dynamics; nothing is compared with numbers of the paper.",
        ),
        Interpretation(
            "Under which assumption a deep linear network is analysed.",
            "The spectral one: Σ_xx, Σ_yx, weights and feedback are diagonal in common bases, so that each component "
            "of Σ_yx = U diag(λ) Vᵀ is a chain of L numbers, θ_l' = m_(l+1)…m_L θ_(l-1)…θ_1 e with e = λ - s θ_L…θ_1. "
            "girotti2021.networks and girotti2021.prediction do without it.",
        ),
        Interpretation(
            "The starts that regularise.",
            "Zero and small weights, from which the times are powers of λ. An aligned hidden weight and an output "
            "weight against its feedback order the components mildly; an output weight along it not at all.",
        ),
        Interpretation(
            "The starts that anti-regularise.",
            "A hidden weight anti-aligned with its feedback path, θ_1 = -c, θ_2 = 0, for components below λ_c = "
            "c³/(3√3m). Of the starts that are the same for all components and were looked at, none without such a "
            "hidden weight does it. Whether it is the paper's is not known.",
        ),
        Interpretation(
            "How the order of learning is measured.",
            "By the first time at which a component's error is at most a tenth of it, and the share of the pairs of "
            "components of which the larger is the earlier.",
        ),
        Interpretation(
            "Input variance s and feedback m.",
            "Both 1 where nothing else is said: another s is another λ/s and s·t, another m another unit of θ_1 and t. "
            "girotti2021.convergence draws m at random.",
        ),
        Interpretation(
            "What guarantees of convergence with rates are.",
            "|e(t)| ≤ |e(0)| exp(-t ΠK_l) where all invariants K_l = m_(l+1) θ_(l+1) - θ_l²/2 are positive, and its "
            "counterpart in steps; of two layers convergence from every start, at the rate ρ* in the end.",
        ),
        Interpretation(
            "The step size of the discrete dynamics.",
            "Shares of η_max, the largest below which all smaller ones converge, found by trial on the recursion; and "
            "of 1/ρ_max, which was sufficient in all that was tried.",
        ),
        Interpretation(
            "Incremental learning is studied for shallow networks.",
            "Two layers everywhere; the order from zero and small weights at three and four layers as well.",
        ),
        Interpretation(
            "Networks, and what they learn.",
            "White inputs, on which the assumption on the data holds exactly: a random map; an image, painted from its "
            "first whitened principal components; its class, told from them. λ_1 is scaled to 1. Feedback N(0, "
            "1/columns); small weights are of size 0.01; the anti-aligned ones are -1.8 along each component, which "
            "puts λ_c at 1.12. Wide hidden layers: how far random feedback couples the components falls with their "
            "width.",
        ),
        Interpretation(
            "Direct feedback alignment is not in the abstract.",
            "It is run beside: of two layers it is feedback alignment, of more the same chain with other constants.",
        ),
        Interpretation(
            "Images: whether the paper has any is not known.",
            "At the preset “paper” Fashion-MNIST, MNIST and its 10,000-digit part, those that are there; the smaller "
            "presets train on the 8 × 8 digits that scikit-learn ships.",
        ),
    ),
)
