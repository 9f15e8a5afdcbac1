"""How the tests are shared out between processes."""

import os

import pytest


def test_a_file_stays_with_one_process(request):
    """Otherwise what a file's tests share is set up by each process, engines too."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("the tests run in one process")
    assert request.node.nodeid.endswith("@tests/test_conftest.py")
