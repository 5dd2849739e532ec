"""The rules: one small file each."""

from falign.rules.adaptive_feedback_alignment import AdaptiveFeedbackAlignment
from falign.rules.backpropagation import Backpropagation
from falign.rules.batchwise_sign_feedback import BatchwiseRandomSignFeedback
from falign.rules.direct_feedback_alignment import DirectFeedbackAlignment
from falign.rules.direct_kolen_pollack import DirectKolenPollack
from falign.rules.direct_random_target_projection import DirectRandomTargetProjection
from falign.rules.eprop import EligibilityPropagation
from falign.rules.error_broadcast import ErrorBroadcast
from falign.rules.feedback_alignment import FeedbackAlignment
from falign.rules.forward_direct_feedback import ForwardDirectFeedback, GradientAlignedFeedback
from falign.rules.input_modulation import InputModulation
from falign.rules.kolen_pollack import KolenPollack
from falign.rules.linear_probe import LinearProbe
from falign.rules.low_dimensional_feedback import LowDimensionalFeedback
from falign.rules.product_feedback_alignment import ProductFeedbackAlignment
from falign.rules.references import Frozen, Shallow
from falign.rules.rule import LawKind, LayerState, Rule
from falign.rules.sign_feedback import FixedRandomSignFeedback, UniformSignFeedback
from falign.rules.weight_mirror import WeightMirror

ALL_RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Backpropagation,
        FeedbackAlignment,
        DirectFeedbackAlignment,
        UniformSignFeedback,
        FixedRandomSignFeedback,
        BatchwiseRandomSignFeedback,
        DirectRandomTargetProjection,
        KolenPollack,
        AdaptiveFeedbackAlignment,
        EligibilityPropagation,
        DirectKolenPollack,
        ProductFeedbackAlignment,
        LinearProbe,
        WeightMirror,
        ForwardDirectFeedback,
        GradientAlignedFeedback,
        ErrorBroadcast,
        LowDimensionalFeedback,
        InputModulation,
        Frozen,
        Shallow,
    )
}

__all__ = [
    "ALL_RULES",
    "AdaptiveFeedbackAlignment",
    "Backpropagation",
    "BatchwiseRandomSignFeedback",
    "DirectFeedbackAlignment",
    "DirectKolenPollack",
    "DirectRandomTargetProjection",
    "EligibilityPropagation",
    "ErrorBroadcast",
    "FeedbackAlignment",
    "FixedRandomSignFeedback",
    "ForwardDirectFeedback",
    "Frozen",
    "GradientAlignedFeedback",
    "InputModulation",
    "KolenPollack",
    "LawKind",
    "LayerState",
    "LinearProbe",
    "LowDimensionalFeedback",
    "ProductFeedbackAlignment",
    "Rule",
    "Shallow",
    "UniformSignFeedback",
    "WeightMirror",
]
