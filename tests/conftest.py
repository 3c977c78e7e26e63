"""Makes the project's files importable from every test, and offers the shared pictures and weights if there are any."""
import sys
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP / folder) for folder in (".", "tests", "benchmarks", "experiments")]
torch.set_num_threads(1)  # the tensors are small, and two threads on a busy machine wait for each other


def pytest_collection_modifyitems(items):
    """The tests that teach come first, robustness/ after them."""
    items.sort(key=lambda item: "robustness" in item.path.parts)


@pytest.fixture(scope="session")
def random_alexnet(tmp_path_factory):
    """A weight file with AlexNet's shapes and random numbers, for tests that only need LPIPS to run."""
    from losses import make_trunk
    path = tmp_path_factory.mktemp("trunk") / "alexnet_features.pth"
    torch.manual_seed(0)
    torch.save(make_trunk("alex").state_dict(), path)
    return str(path)


@pytest.fixture
def shared():
    """../shared: photos, trunk weights, golden pictures. Tests that need it are skipped where it is missing."""
    folder = TOP.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared (photos and trunk weights), which is not part of the project")
    return folder
