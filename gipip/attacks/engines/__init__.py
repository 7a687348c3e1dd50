"""How an attack computes the client's gradient, which it then differentiates once more.

Attacks know one function, `client_gradient`, and what it gives: something to call with
normalised images and labels. Its engines agree within rounding:

- "eager": autograd's double backward, the reference;
- "traced": the gradient written out once as a plain function of the images (traced.py);
- "cudagraph": the same, and whole iterations captured and replayed on a GPU (replay.py).
"""

from gipip.attacks.engines.eager import ClientGradient
from gipip.attacks.engines.replay import Captured
from gipip.attacks.engines.traced import Traced
from gipip.errors import EngineError
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel, mixes_images

ENGINES: dict[str, type[ClientGradient]] = {
    "eager": ClientGradient,
    "traced": Traced,
    "cudagraph": Captured,
}


def client_gradient(
    model: ClientModel,
    update: SharedUpdate,
    engine: str = "auto",
    replayable: bool = True,
    chunk_size: int | None = None,
) -> ClientGradient:
    """What a client with `model` would share instead of `update`, for any images and labels.

    `engine`: by default the fastest. `replayable`: whether every step of the attack
    does the same work. `chunk_size`: so many images at a time. Raises EngineError for
    what cannot run here.
    """
    cuda = next(model.parameters()).is_cuda
    if engine == "auto":
        engine = "cudagraph" if cuda and replayable else "traced"
    if engine not in ENGINES:
        raise EngineError(f"Unknown engine {engine!r}. Known: auto, {', '.join(ENGINES)}.")
    if engine == "cudagraph" and not (cuda and replayable):
        raise EngineError(
            "The engine 'cudagraph' needs model and update on an NVIDIA GPU, and an attack whose "
            "optimiser does not decide on the values it sees. Use 'traced'."
        )
    if chunk_size is not None:
        apart = not update.fedavg and not mixes_images(model.network)
        if chunk_size < 1 or engine == "eager" or not apart:
            raise EngineError(
                f"The gradient cannot be taken in chunks of {chunk_size}: that needs a number "
                "above 0, another engine than 'eager', one gradient rather than local training, "
                "and BatchNorm in eval mode with running statistics. Leave out chunk_size."
            )
    return ENGINES[engine](model, update, chunk_size)
