"""The feed-forward part of a layer: dense, or of experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from maveriq.domain.matrices import Matrix, check_counts
from maveriq.errors import InputError


class FeedForward(ABC):
    """The feed-forward part of a layer."""

    @abstractmethod
    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the weight matrices."""

    @property
    def vectors(self) -> int:
        """Parameters that are no matrix."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFeedForward(FeedForward):
    """A feed-forward part that every token passes.

    Args:
        width: values between its matrices.
        matrices: 3 where it is gated, else 2.
        bias: whether its matrices have a bias.
    """

    width: int
    matrices: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        check_counts(self, ("width", "matrices"))

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the projections up and down, and the gate's."""
        return _feed_forward("mlp", hidden_size, self.width, self.matrices, bias=self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFeedForward(FeedForward):
    """A feed-forward part of experts, of which a router picks some for each token.

    Args:
        experts: routed experts.
        experts_per_token: those that a token passes.
        width: values between an expert's matrices.
        shared_width: the same of all shared experts together, which every token passes; 0 where there are none.
        matrices: 3 where experts are gated, else 2.
        bias: whether experts and router have a bias. shared_bias: whether shared experts have one.
        router_correction: the router has a correction for each expert, beside its matrix.
        shared_gate: the shared experts' output is weighted by a gate.
        module: the module that router and experts lie in; "" for the layer itself, beside a part that all tokens pass.
        latent_size: size of the vectors that routed experts work on, where it is not the hidden size; else 0.
    """

    experts: int
    experts_per_token: int
    width: int
    shared_width: int = 0
    matrices: int = 3
    bias: bool = False
    shared_bias: bool = False
    router_correction: bool = False
    shared_gate: bool = False
    latent_size: int = 0
    module: str = "mlp"

    def __post_init__(self) -> None:
        check_counts(self, ("experts", "experts_per_token", "width", "matrices"))
        if self.experts_per_token > self.experts:
            raise InputError(
                f"experts: a token cannot pass {self.experts_per_token} of {self.experts} experts (experts_per_token)"
            )

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the router, the experts and the shared experts."""
        experts, active, size = self.experts, self.experts_per_token, self.latent_size or hidden_size
        within = f"{self.module}." if self.module else ""
        found = [Matrix(name=f"{within}gate", inputs=hidden_size, outputs=experts, bias=self.bias, keeps_16_bits=True)]
        if self.latent_size:
            found += [
                Matrix(name=f"{within}fc1_latent_proj", inputs=hidden_size, outputs=size),
                Matrix(name=f"{within}fc2_latent_proj", inputs=size, outputs=hidden_size),
            ]
        found += _feed_forward(
            f"{within}experts", size, self.width, self.matrices, copies=experts, active=active, bias=self.bias
        )
        if self.shared_width:
            shared = "mlp.shared_experts" if within else "mlp"
            found += _feed_forward(shared, hidden_size, self.shared_width, self.matrices, bias=self.shared_bias)
        if self.shared_gate:
            found.append(Matrix(name="mlp.shared_expert_gate", inputs=hidden_size, outputs=1, keeps_16_bits=True))
        return tuple(found)

    @property
    def vectors(self) -> int:
        """The router's correction."""
        return self.experts if self.router_correction else 0


def _feed_forward(
    name: str, size: int, width: int, matrices: int, *, copies: int = 1, active: int = 1, bias: bool = False
) -> tuple[Matrix, ...]:
    up = [
        Matrix(name=f"{name}.{part}", inputs=size, outputs=width, copies=copies, active=active, bias=bias)
        for part in ("gate_proj", "up_proj")[3 - matrices :]
    ]
    down = Matrix(name=f"{name}.down_proj", inputs=width, outputs=size, copies=copies, active=active, bias=bias)
    return (*up, down)
