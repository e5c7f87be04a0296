"""Learned BeamFusion: tau and psi as functions of the user instead of two constants.

Where the beams are sure, their scores say much; where they are not, the cosine has to decide. A small network reads how
sure they are and how much is known of the user, and gives each user his own pair.

Axis letters: B rows, M beams, C candidates over all rows, F features.
"""

import math
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing
from recsys_lightning.nn.mlp import MLP
from recsys_lightning.retrieval.beam_fusion import Candidates

Mode = Literal["global", "per_id"]

FEATURES = ("entropy of the beams", "log probability of the best beam", "log history length", "largest cosine")
_AT_ONE = math.log(math.e - 1)  # softplus of it is 1


def user_features(log_probs: Tensor, lengths: Tensor, found: Candidates) -> Tensor:
    """(B, F) what `FusionWeights` knows of each user, in the order of `FEATURES`.

    Args:
        log_probs: (B, M) of the beams, best first. Their entropy, in nats, is that of the beams' shares among
            themselves.
        lengths: (B,) items of the history, at least 1.
        found: the beams' candidates.
    """
    log_share = log_probs.float().log_softmax(1)
    entropy = -(log_share.exp() * log_share).sum(1)
    largest = found.cosine.new_full((len(log_probs),), -1.0).scatter_reduce(0, found.row, found.cosine, "amax")
    return torch.stack([entropy, log_probs[:, 0].float(), lengths.clamp(min=1).log().float(), largest], 1)


class FusionWeights(nn.Module):
    """tau and psi of each user, for `beam_fusion`: the fixed pair times two softplus outputs of a small MLP.

    As built, and until it is trained, it gives every user the fixed pair. It is learned for one number of beams and one
    mode, which travel with it.

    Args:
        tau: the fixed weight of the beam score that it starts from.
        psi: the fixed weight of the cosine that it starts from.
        mode: domain of the second softmax that it is learned for.
        num_beams: M that it is learned for.
        hidden: width of the hidden layer.

    Raises:
        InputError: a fixed weight that is not above 0: there would be nothing to learn.
    """

    start: Tensor  # (2,) the fixed tau and psi
    center: Tensor  # (F,)
    scale: Tensor  # (F,)

    def __init__(self, tau: float, psi: float, mode: Mode = "global", num_beams: int = 50, hidden: int = 16):
        super().__init__()
        for name, value in (("tau", tau), ("psi", psi)):
            if not value > 0:
                raise InputError(f"learned BeamFusion starts from a fixed {name}, which must be above 0, got {value}")
        self.mode: Mode = mode
        self.num_beams, self.hidden = num_beams, hidden
        self.register_buffer("start", torch.tensor([tau, psi], dtype=torch.float32))
        self.register_buffer("center", torch.zeros(len(FEATURES)))
        self.register_buffer("scale", torch.ones(len(FEATURES)))
        self.mlp = MLP([len(FEATURES), hidden, 2], activation=nn.GELU)
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)  # noqa: S101 - an MLP ends so
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, _AT_ONE)

    def standardize(self, features: Tensor) -> None:
        """Take the mean and the spread of features (B, F) of the users it is to learn from as origin and unit."""
        self.center.copy_(features.mean(0))
        spread = features.std(0, correction=0)
        self.scale.copy_(torch.where(spread > 1e-6, spread, 1.0))  # a feature that never changes says nothing

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """tau (B,) and psi (B,) of users with features (B, F)."""
        factors = F.softplus(self.mlp((features - self.center) / self.scale))  # (B, 2)
        tau, psi = (self.start * factors).unbind(1)
        return tau, psi

    def to_bytes(self) -> bytes:
        """The safetensors file that `load` reads."""
        metadata = {"mode": self.mode, "num_beams": str(self.num_beams), "hidden": str(self.hidden)}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        content: bytes = to_safetensors(state, metadata)
        return content

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: whole or not at all, whenever the process dies."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or none of ours.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no fusion weights at {path}; learn them with `recsys study learned-fusion RUN`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            tau, psi = state["start"].tolist()
            mode: Mode = "per_id" if metadata["mode"] == "per_id" else "global"
            made = cls(tau, psi, mode, int(metadata["num_beams"]), int(metadata["hidden"]))
            made.load_state_dict(state)
        # OSError: safetensors maps the file into memory, which fails on an empty one; RuntimeError: other weights.
        except (SafetensorError, KeyError, ValueError, OSError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{path} holds no fusion weights, or damaged ones ({reason}); learn them anew") from error
        return made
