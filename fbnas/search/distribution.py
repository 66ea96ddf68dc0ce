"""ArchitectureDistribution: theta, and everything that is computed from theta alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fbnas.space.architecture import Architecture
from fbnas.space.search_space import SearchSpace


class ArchitectureDistribution(nn.Module):
    """P_theta(a) = prod_l softmax(theta_l)[a_l] (Wu et al. 2019, section 3.2), layers independent.

    `logits` is theta, (layers, blocks), zero at first: every block equally likely. Blocks that a
    layer does not offer have probability 0 and receive no gradient. `offered`, (layers, blocks)
    bool, leaves out further ones: those that no budget allows.
    """

    offered: Tensor

    def __init__(self, space: SearchSpace, offered: Tensor | None = None) -> None:
        super().__init__()
        self.space = space
        self.logits = nn.Parameter(torch.zeros(len(space.layers), len(space.blocks)))
        left = space.offered if offered is None else space.offered & offered.cpu()
        self.register_buffer("offered", left.clone(), persistent=False)

    def masked_logits(self) -> Tensor:
        """Theta with -inf where a block is not offered: (layers, blocks)."""
        return self.logits.masked_fill(~self.offered, -torch.inf)

    def probabilities(self) -> Tensor:
        """softmax(theta_l)_i: (layers, blocks), rows sum to 1."""
        return self.masked_logits().softmax(dim=1)

    def log_probabilities(self) -> Tensor:
        """log softmax(theta_l)_i: (layers, blocks), -inf where not offered."""
        return self.masked_logits().log_softmax(dim=1)

    def gates(
        self,
        tau: float,
        *,
        hard: bool = False,
        draws: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw m_l = softmax((theta_l + g_l) / tau) with g ~ Gumbel(0, 1): (layers, blocks).

        With `hard` the gates are the one-hot of the largest entry and the gradient is that of the
        relaxed gates (straight-through).
        Source: Jang et al. 2016 (arXiv 1611.01144), equation 2 and section 2.2.

        Args:
            draws: so many independent draws, (draws, layers, blocks), for instance one per image,
                whose mean varies less than a single draw.

        Raises:
            ValueError: tau is not positive.
        """
        soft = (self._noisy(draws, tau, generator) / tau).softmax(dim=-1)
        return _straight_through(soft) if hard else soft

    def two_path_gates(
        self, tau: float, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[list[int]]]:
        """Draw two blocks per layer, and hard gates between them.

        The largest two of theta + g are two draws from P_theta without replacement, and the first
        is a draw from P_theta itself: its gate is 1. The gradient is that of softmax over the two
        (Cai et al. 2019, ProxylessNAS, arXiv 1812.00332, section 3.2.2, with Gumbel noise), so a
        step needs two branches a layer instead of all.

        Returns:
            Gates (layers, blocks), and the indices of the blocks that were drawn, per layer: two,
            or one where only one is offered.

        Raises:
            ValueError: tau is not positive.
        """
        noisy = self._noisy(None, tau, generator)
        drawn = noisy.detach().topk(min(2, noisy.shape[1]), dim=1).indices
        chosen = torch.zeros_like(self.offered).scatter(1, drawn, True) & self.offered
        soft = (noisy.masked_fill(~chosen, -torch.inf) / tau).softmax(dim=1)
        among = [
            [i for i in pair if known[i]]
            for pair, known in zip(drawn.tolist(), self.offered.tolist(), strict=True)
        ]
        return _straight_through(soft), among

    def _noisy(self, draws: int | None, tau: float, generator: torch.Generator | None) -> Tensor:
        """Theta plus Gumbel noise, -inf where not offered: ([draws,] layers, blocks)."""
        if not tau > 0:
            raise ValueError(f"tau is {tau}; expected a positive temperature.")
        shape = self.logits.shape if draws is None else (draws, *self.logits.shape)
        # -log of an Exponential(1) draw is a Gumbel(0, 1) draw, and never infinite.
        noise = -self.logits.new_empty(shape).exponential_(generator=generator).log()
        return self.masked_logits() + noise

    def sample_path(self, generator: torch.Generator | None = None) -> list[int]:
        """Draw one block index per layer from P_theta."""
        with torch.no_grad():
            probabilities = self.probabilities()
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).tolist()

    def sample(self, generator: torch.Generator | None = None) -> Architecture:
        """Draw an architecture from P_theta."""
        return self.architecture(self.sample_path(generator), source="sampled from P_theta")

    def most_probable(self) -> Architecture:
        """Return the single most probable architecture, whatever it costs."""
        path = self.probabilities().argmax(dim=1).tolist()
        return self.architecture(path, source="most probable")

    def architecture(self, path: Sequence[int], *, source: str) -> Architecture:
        """Name the blocks of a path and note its log-probability."""
        return Architecture.from_path(
            self.space, list(path), log_probability=self.log_probability(path), source=source
        )

    def log_probability(self, choice: Architecture | Sequence[int]) -> float:
        """log P_theta(a) = sum_l log softmax(theta_l)[a_l], in nats."""
        path = choice.path(self.space) if isinstance(choice, Architecture) else list(choice)
        with torch.no_grad():
            logs = self.log_probabilities().double()
            return float(logs[torch.arange(len(path)), torch.tensor(path)].sum())

    def entropy(self) -> Tensor:
        """Entropy of each layer's choice, in nats: (layers,)."""
        p = self.probabilities()
        return -torch.special.xlogy(p, p).sum(dim=1)

    def expected(self, cost: Tensor, *, base: float = 0.0) -> Tensor:
        """E[cost] = base + sum_l sum_i softmax(theta_l)_i cost_li (Wu et al. 2019, equation 6).

        `cost`: (layers, blocks), in any unit, nan where not offered. Exact, free of noise and
        differentiable in theta; returns a scalar tensor in the unit of `cost`.
        """
        known = cost.to(self.logits.device).masked_fill(~self.offered, 0.0)
        return base + (self.probabilities() * known.to(self.logits.dtype)).sum()

    def skipped_layers(self) -> tuple[int, int]:
        """How many layers skip if each takes its likeliest block, and how many can."""
        if "skip" not in self.space.blocks:
            return 0, 0
        skip = self.space.blocks.index("skip")
        keeps = torch.tensor([layer.keeps_shape for layer in self.space.layers])
        able = keeps & self.offered[:, skip] & (self.offered.sum(1) > 1)
        likeliest = self.probabilities().argmax(1) == skip
        return int((likeliest & able).sum()), int(able.sum())

    def expected_skips(self) -> Tensor:
        """Probability that each layer is skipped, counted where skip is the identity: (layers,)."""
        if "skip" not in self.space.blocks:
            return torch.zeros(len(self.space.layers))
        column = self.probabilities()[:, self.space.blocks.index("skip")]
        keeps = torch.tensor([layer.keeps_shape for layer in self.space.layers])
        return column * keeps.to(column)


def _straight_through(soft: Tensor) -> Tensor:
    """The one-hot of the largest entry of each row, with the gradient of `soft`."""
    one_hot = functional.one_hot(soft.argmax(dim=-1), soft.shape[-1]).to(soft.dtype)
    return one_hot - soft.detach() + soft
