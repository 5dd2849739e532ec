"""Garg and Vempala 2022: how and when random feedback works, on low-rank matrix factorisation."""

from falign.lab.experiment import Interpretation, LazyExperiments, Paper

__all__ = ["GARG2022"]

GARG2022 = Paper(
    name="garg2022",
    title="How and When Random Feedback Works: A Case Study of Low-Rank Matrix Factorization",
    authors="Shivam Garg, Santosh S. Vempala",
    venue="AISTATS 2022",
    address="https://arxiv.org/abs/2111.08706",
    experiments=LazyExperiments(
        {
            "garg2022.convergence": "falign.papers.garg2022.convergence:CONVERGENCE",
            "garg2022.alignment": "falign.papers.garg2022.alignment:ALIGNMENT",
            "garg2022.ranks": "falign.papers.garg2022.ranks:RANKS",
            "garg2022.separation": "falign.papers.garg2022.separation:SEPARATION",
            "garg2022.representations": "falign.papers.garg2022.representations:REPRESENTATIONS",
            "garg2022.networks": "falign.papers.garg2022.networks:NETWORKS",
            "garg2022.range-finder": "falign.papers.garg2022.range_finder:RANGE_FINDER",
        }
    ),
    interpretations=(
        Interpretation(
            "Only the abstract could be read: no theorem, definition, initialisation, hard instance, figure or size.",
            "Every claim says whether it is a sentence of the abstract or derived here; nothing is compared with "
            "numbers of the paper. The derivations are in the module falign.theory.factorisation.",
        ),
        Interpretation(
            "Which factor carries the feedback.",
            "W: in Y ≈ ZW the input, of dimension m, meets W first, so that the error comes to it through Zᵀ, which B "
            "(r × n) replaces: Ż = RWᵀ, Ẇ = BR with R = Y - ZW. Both factors move at once.",
        ),
        Interpretation(
            "What FA* is, “a closely related variant of FA”.",
            "The output layer is always the best for the hidden one, Z = YWᵀ(WWᵀ)⁻¹, and the hidden one moves as in FA."
            " Of it what the abstract says of FA* can be derived: tr(BZWWᵀ) never falls, which makes it converge.",
        ),
        Interpretation(
            "Scale of B.",
            "Entries N(0, 1/n). From a zero start it sets the unit of time only: B → cB is t → t/c^(2/3). Whether FA "
            "is slower than gradient descent depends on it.",
        ),
        Interpretation(
            "What “come closer” means.",
            "tr(BZ) = ⟨Bᵀ, Z⟩, in which there are laws: tr(BZ) gains ½|W|² under FA, and never falls under FA* from "
            "orthonormal rows. The cosine is shown beside it; it has no such law.",
        ),
        Interpretation(
            "Initialisation.",
            "FA from zero, where WWᵀ - BZ - (BZ)ᵀ = 0 makes |BR|² fall, and from small normal entries. Gradient "
            "descent from small normal entries, as it never leaves zero. FA* from orthonormal rows of W.",
        ),
        Interpretation(
            "The hard instance of “far from optimal”.",
            "diag(1, …, 1, ε) with r ones: FA leaves out the direction that B does not see, gradient descent the cheap "
            "one. And r ones with a long flat tail, on which no luck is involved.",
        ),
        Interpretation(
            "Matrices, and what “representations” and “almost orthogonal” are.",
            "Representations are the row spaces of W, their overlap |P_FA P_GD|²/r is the mean squared cosine of the "
            "principal angles; “almost” is at most 0.1, “approximately equal” within 5 %. Flat: singular values 1.1 "
            "and 1; and normal matrices. The largest singular value of every Y is scaled to 1; synthetic spectra are "
            "diagonal, as B and the starts are normal and no basis is special to them. Real ones are images by pixels.",
        ),
        Interpretation(
            "Step sizes and lengths.",
            "η below the rate up to which steps follow the flow; the discrete recursion and the flow are compared.",
        ),
        Interpretation(
            "What “0” is at the end of a run of finite length.",
            "1e-6 of |Y| for FA from zero. 1 % elsewhere: unlucky draws converge slowly, at a rate set by the least "
            "singular value of a square Gaussian matrix, or by the least of what a random start has.",
        ),
        Interpretation(
            "Larger data.",
            "At the preset “paper” MNIST and Fashion-MNIST, those that are there, beside the 8 × 8 digits that "
            "scikit-learn ships, which the smaller presets use. What is not there is shown as missing.",
        ),
    ),
)
