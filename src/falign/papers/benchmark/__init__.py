"""The field's table: rules beside backpropagation and references, tuned alike, and published values beside ours."""

from falign.lab.experiment import Interpretation, LazyExperiments, Paper

__all__ = ["BENCHMARK"]

BENCHMARK = Paper(
    name="benchmark",
    title="The field's table: learning without weight transport beside backpropagation",
    authors="The falign developers",
    venue="This package",
    address="https://arxiv.org/abs/2306.02325",
    experiments=LazyExperiments(
        {
            "benchmark.table": "falign.papers.benchmark.table:TABLE",
            "benchmark.published": "falign.papers.benchmark.published:PUBLISHED",
        }
    ),
    interpretations=(
        Interpretation(
            "What is tuned, and on what.",
            "The learning rate, by a study of Optuna of the same number of trials for every row: 0.03, 0.01, 0.1, then "
            "the tree-structured Parzen estimator between 0.001 and 0.3. Judged on 5,000 training images that are kept "
            "apart, the same for all; of small sets on a tenth. Decay is the row's: 0.001 where feedback meets the "
            "weights by it (kp, pfa, ldfa), else 0. All other options are defaults.",
        ),
        Interpretation(
            "What the test images are looked at with.",
            "The network of the best trial as it was trained, once; it is not trained again.",
        ),
        Interpretation(
            "A training that leaves the finite numbers.",
            "It is recorded as such, is worse to the search than any number, and has no accuracy; a run of which all "
            "trainings do so has diverged, and has no place in a mean.",
        ),
        Interpretation(
            "The network of the audit is described, not published.",
            "Pixels linearly to a stream of 256, four blocks x + fc2(relu(fc1(norm(x)))), norm, linear. Its error is "
            "delivered to every linear map; frozen trains the last layer and the norm in front of it stays as it was.",
        ),
        Interpretation(
            "What a step costs.",
            "Seconds by turns with backpropagation in the same process, after which they are compared as a ratio; "
            "floating-point operations are counted, those of passes between steps shared out; of one true step in 100 "
            "the operations are, the seconds are not. Bytes are what autograd keeps for the backward pass.",
        ),
        Interpretation(
            "Images that are smaller than 12 × 12.",
            "LeNet is shown them at twice their size: the digits of the smaller presets.",
        ),
        Interpretation(
            "biotorch states no learning rate for Fashion-MNIST, nor its start.",
            "0.01, and PyTorch's own initial weights. Its numbers are of the best epoch on the very images that they "
            "are reported on, so ours beside them are, too; its direct feedback through convolutions is the same at "
            "every position, ours is a full random map.",
        ),
        Interpretation(
            "DFA-Stall's feedback from zero weights is uniform by fan-out; its loss a sum of cross-entropies.",
            "Normal feedback of falign's default size; the sum over classes, the mean over the batch.",
        ),
    ),
)
