"""Every test runs with the shapes and types in gipip's signatures checked, on one thread."""

import os

from jaxtyping import install_import_hook

install_import_hook("gipip", "signatures.checked")  # before gipip is imported for the first time
os.environ["GIPIP_HEADLESS"] = "1"

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """Signatures go unchecked, as where a user passes something else than they say."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
