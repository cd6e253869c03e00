"""AdamW."""

from collections.abc import Sequence

from ebft_mega.extension.update_rule import Optimizer, UpdateSettings, UpdateSlice

EPSILON = 1e-8


class AdamW(Optimizer):
    """AdamW with decoupled weight decay and float32 moments; epsilon is 1e-8 (torch's implementation)."""

    name = "adamw"
    moments = ("exp_avg", "exp_avg_sq")
    temporaries = 2

    def update(self, slices: Sequence[UpdateSlice], updates: int, settings: UpdateSettings) -> None:
        """Apply torch's own function to all slices at once."""
        import torch
        from torch.optim.adamw import adamw

        adamw(
            [each.weights for each in slices],
            [each.gradient for each in slices],
            [each.moments[0] for each in slices],
            [each.moments[1] for each in slices],
            [],
            [torch.tensor(float(updates)) for _ in slices],  # each call counts its own update
            foreach=None,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            eps=EPSILON,
            maximize=False,
        )
