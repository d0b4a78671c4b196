"""Both ways of the kernels: compiled, and NumPy."""

import pytest

from toolkit.quantize import kernels


@pytest.fixture(params=["compiled", "numpy"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with each implementation; the compiled one has to be there."""
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "load_library", lambda: None)
    else:
        assert kernels.load_library(), "not compiled: install a C compiler and run make setup"
    return str(request.param)
