"""Kernels of two-layer networks: Ḡ at infinite width, G and H at any."""

from falign.theory.two_layer.kernels.expectation import hermite_coefficients as hermite_coefficients
from falign.theory.two_layer.kernels.expectation import pair_means as pair_means
from falign.theory.two_layer.kernels.finite import Kernels as Kernels
from falign.theory.two_layer.kernels.finite import kernels as kernels
from falign.theory.two_layer.kernels.finite import kernels_of_weights as kernels_of_weights
from falign.theory.two_layer.kernels.limit import limiting_kernel as limiting_kernel
from falign.theory.two_layer.kernels.limit import limiting_kernel_by_quadrature as limiting_kernel_by_quadrature
from falign.theory.two_layer.kernels.training import KernelCourse as KernelCourse
from falign.theory.two_layer.kernels.training import follow_kernels as follow_kernels
from falign.theory.two_layer.kernels.training import kernels_of_engine as kernels_of_engine

__all__ = [
    "KernelCourse",
    "Kernels",
    "follow_kernels",
    "hermite_coefficients",
    "kernels",
    "kernels_of_engine",
    "kernels_of_weights",
    "limiting_kernel",
    "limiting_kernel_by_quadrature",
    "pair_means",
]
