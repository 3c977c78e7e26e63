"""Makes the files at the top importable, and offers the folder of shared pictures and weights where there is one."""
import sys
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP))
torch.set_num_threads(1)  # the tensors are small, and two threads on a busy machine wait for each other


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
