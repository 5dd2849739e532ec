"""Robertson and Koyejo 2024: a conservation law of feedback alignment, and what it says of practical training."""

from falign.lab.experiment import Interpretation, LazyExperiments, Paper

__all__ = ["ROBERTSON2024"]

ROBERTSON2024 = Paper(
    name="robertson2024",
    title="Implicit Regularization in Feedback Alignment Learning Mechanisms for Neural Networks",
    authors="Zachary Robertson, Oluwasanmi Koyejo",
    venue="ICML 2024",
    address="https://arxiv.org/abs/2306.01870",
    experiments=LazyExperiments(
        {
            "robertson2024.conservation": "falign.papers.robertson2024.conservation:CONSERVATION",
            "robertson2024.dominance": "falign.papers.robertson2024.dominance:DOMINANCE",
            "robertson2024.classes": "falign.papers.robertson2024.classes:CLASSES",
            "robertson2024.overfitting": "falign.papers.robertson2024.overfitting:OVERFITTING",
            "robertson2024.minimum-norm": "falign.papers.robertson2024.minimum_norm:MINIMUM_NORM",
        }
    ),
    interpretations=(
        Interpretation(
            "Only the abstracts of both versions, a summary and an index of the experiments could be read: no theorem, "
            "figure, architecture, rate or table of numbers.",
            "Every claim says whether it is the abstract's, the summary's or the index's, or derived here; nothing is "
            "compared with numbers of the paper.",
        ),
        Interpretation(
            "What adaFA is.",
            "The tracking B ← (1-α)B + αW, adafa, of which α = 0 is feedback alignment and α = 1 backpropagation; "
            "α = 0.01 beside other rules, α = 0.1η where the limit of small steps is looked at. Kolen-Pollack, kp, "
            "which the name could mean too, is run beside it, without weight decay.",
        ),
        Interpretation(
            "How alignment dominance is defined.",
            "D = Σ_(l<L) ⟨g_l, f_l⟩/|g_L|² with g_l the true gradient of layer l and f_l the one that it takes; it "
            "dominates with κ where D ≥ κ - 1. Then dL/dt ≤ -κ|g_L|².",
        ),
        Interpretation(
            "“Certain initialization schemes”.",
            "Four, from the conservation law: dominant, small, generic and anti of falign.init.",
        ),
        Interpretation(
            "Scale of the feedback.",
            "Its entries have variance scale²/spread. 0.6, about the size of PyTorch's own weights, for all rules, so "
            "that norm is no difference between them; but 1, about Xavier's size, for dominance: at 0.6 the start "
            "against the feedback, W = -B, is too weak to make the loss rise.",
        ),
        Interpretation(
            "Architectures, rates and lengths.",
            "Classes: perceptrons of three hidden layers, descent with momentum 0.9; the same number of steps whatever "
            "the number of classes, so that more classes do not train longer. Overfitting: one wide hidden layer. "
            "Conservation: a perceptron of two hidden layers, and two convolutions with ReLU and max pooling before "
            "two linear layers. Convolutional networks of CIFAR-100 and Tiny-ImageNet: LeNet-5.",
        ),
        Interpretation(
            "How alignment is measured.",
            "Mean over the layers below the output of the cosine between the gradient that a layer takes and its true "
            "one, weights and biases, on 256 training images; averaged over eleven records of the training, the start "
            "and the end among them, as alignment at the end alone forgets how the network got there.",
        ),
        Interpretation(
            "How alignment and accuracy are correlated.",
            "Over the rules, one correlation a seed; the interval is of the mean over the seeds, by Fisher's z and "
            "Student's t. The rules are these seven, not a sample of rules.",
        ),
        Interpretation(
            "Random n-class subsets.",
            "A fresh order of the classes a seed, of which the first n: the subsets of one seed are nested. All rules "
            "of a seed have the same subset, weights and batches.",
        ),
        Interpretation(
            "20 % label noise.",
            "That share of the training labels, exactly, is changed to one of the other classes, each as likely; test "
            "labels stay right. “Benign” is judged in a weak and in a strict sense.",
        ),
        Interpretation(
            "Minimum norm: data and start are not stated.",
            "Normal inputs and targets; and one image of each of ten classes, less the mean image. In both the largest "
            "singular value is √n. The claim is exact for W₁(0) = 0, which is taken.",
        ),
        Interpretation(
            "Images: the paper has MNIST, CIFAR-100 and Tiny-ImageNet.",
            "At the preset “paper” these, Fashion-MNIST and the 10,000-digit part of MNIST, those that are there; the "
            "smaller presets train on the 8 × 8 digits that scikit-learn ships. What is not there is shown as missing.",
        ),
    ),
)
